"""For all layers: a property is judged by what it says, not by how long a busy machine takes for one example."""

from hypothesis import settings

settings.register_profile("orion", deadline=None)
settings.load_profile("orion")
