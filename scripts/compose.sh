#!/bin/bash
# Run Docker Compose like make up does, with the same program, project and settings.
. "$(dirname "$0")/common.sh"
load_settings
compose "$@"
