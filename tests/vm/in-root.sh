#!/bin/sh
# In the root file system that build-root.sh makes, with the checkout in /src: everything that the suite needs, while there is a network.
set -eu
venv=/opt/nsjail_py/venv
sh /src/vagrant/provision/debian.sh
DEV_VENV=$venv /src/dev setup
"$venv/bin/python" - <<'PYTHON' >/tmp/requirements
import tomllib
with open("/src/pyproject.toml", "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], *project["project"]["dependencies"], *project["project"]["optional-dependencies"]["warm"], sep="\n")
PYTHON
"$venv/bin/pip" download -q -d /opt/nsjail_py/wheels -r /tmp/requirements
rm /tmp/requirements
