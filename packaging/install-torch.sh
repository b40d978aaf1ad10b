#!/bin/sh
# Installs the torch that fits this machine, by one small table of machine, kernel and driver:
#
#   -tegra kernel (Jetson)        NVIDIA's own torch, taken from the system; never PyPI's
#   no NVIDIA driver              CPU build, x86-64 and aarch64 alike (PyPI's aarch64 torch is a CUDA build of gigabytes)
#   NVIDIA driver, x86-64         PyPI's default build
#   macOS                         PyPI's default build
#
# usage: install-torch.sh PYTHON | install-torch.sh --venv-flags
set -eu
VERSION=2.13.0
case "$(uname -r)" in *-tegra) kind=jetson ;; *) case "$(uname -s)" in Darwin) kind=macos ;; *)
    if [ -e /proc/driver/nvidia/version ] && [ "$(uname -m)" = x86_64 ]; then kind=cuda; else kind=cpu; fi ;; esac ;; esac

if [ "${1:-}" = --venv-flags ]; then
    if [ "$kind" = jetson ]; then echo --system-site-packages; fi
    exit 0
fi
python=$1
if "$python" -c "import torch, sys; sys.exit(not torch.__version__.startswith('$VERSION'))" 2>/dev/null; then exit 0; fi

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
case $kind in
jetson)
    if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then exit 0; fi
    echo "This is a Jetson ($(uname -r)) and no torch with CUDA is installed for $("$python" --version)."
    echo "Fetch NVIDIA's wheel for your JetPack, torch-*-linux_aarch64.whl, install it for the system's Python, and run this again."
    exit 1 ;;
cuda) echo "torch $VERSION for $(uname -m) with CUDA: about 3,000 MB"; pip install -q "torch==$VERSION" ;;
macos) echo "torch $VERSION for macOS: about 80 MB"; pip install -q "torch==$VERSION" ;;
cpu)
    echo "torch $VERSION for $(uname -m), CPU build: about 200 MB"
    if [ -n "${TORCH_INDEX:-}" ] && "$python" - "$TORCH_INDEX" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=4).read(1)
PY
    then pip install -q --retries 0 --timeout 60 --index-url "$TORCH_INDEX" "torch==$VERSION" && exit 0; fi
    # Not reachable: the configured index may serve a CPU build under the same version. What it would take is looked at first.
    plan=$(pip install --dry-run --quiet --report - "torch==$VERSION" 2>/dev/null) || {
        echo "Neither the CPU index nor the configured one has torch $VERSION."
        echo "Fetch torch-$VERSION+cpu-*-$(uname -m).whl and install it with: $python -m pip install FILE"; exit 1; }
    if printf %s "$plan" | "$python" -c 'import json, sys
names = [i["metadata"]["name"].lower() for i in json.load(sys.stdin)["install"]]
sys.exit(not any(n.startswith(("nvidia-", "cuda-", "triton")) for n in names))'; then
        echo "The configured index would install a CUDA build (gigabytes) on a machine without an NVIDIA driver."
        echo "Fetch torch-$VERSION+cpu-*-$(uname -m).whl and install it with: $python -m pip install FILE"; exit 1
    fi
    pip install -q "torch==$VERSION" ;;
esac
