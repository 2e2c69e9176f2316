#!/bin/bash
# Docker Compose as make up uses it: the right program, project and settings. For Makefile and for a person.
. "$(dirname "$0")/common.sh"
load_settings
compose "$@"
