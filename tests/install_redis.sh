#!/usr/bin/env bash
# Installs the redis-server that tests/test_store.py starts for itself. Does nothing where there is one.
set -euo pipefail
if ! command -v redis-server > /dev/null; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -q
  # RUNLEVEL=1 keeps Debian from starting the package's own service; the tests want only the program.
  $sudo env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends redis-server
fi
redis-server --version
