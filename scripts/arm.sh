#!/usr/bin/env bash
# FlashMoE on ARM, without an ARM machine: Debian's arm64 in a folder, its programs run by qemu.
# As root, on Debian for x86-64: bash scripts/arm.sh FOLDER     (3 GB; what is in it is kept for the next run)
#
# It installs FlashMoE's wheel with its dependencies, from PyPI's wheels for aarch64, into a virtual environment there,
# and runs the self-test, `flashmoe doctor`, the demo, the tests of reads, and the exactness tests of three architectures.
# Speed, memory bandwidth and the drive cannot be shown in this way: qemu translates every instruction.
set -euo pipefail
root=$(realpath -m "${1:?usage: arm.sh FOLDER}") source=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export DEBIAN_FRONTEND=noninteractive

apt-get install -y -qq --no-install-recommends binfmt-support debootstrap qemu-user-static >/dev/null
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --import qemu-aarch64

if [ ! -e "$root/etc/debian_version" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)
    debootstrap --arch=arm64 --variant=minbase --include=libgomp1,python3-venv \
        "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$root" "$mirror" >"$root.log"
fi
mounts() { mount -t proc none "$root/proc"; mount --bind /dev "$root/dev"; }
unmounts() { umount "$root/proc" "$root/dev"; }
trap unmounts EXIT
mounts
inside() { chroot "$root" env HOME=/root LANG=C.UTF-8 PATH=/flashmoe/venv/bin:/usr/bin:/bin "$@"; }

# pip outside knows the registry that this machine uses; only the installation is emulated
mkdir -p "$root/flashmoe/wheels"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$root/flashmoe/wheels" "$source"
version=$(inside python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
platforms=(--platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64)
"$python" -m pip download --quiet --only-binary=:all: "${platforms[@]}" --python-version "$version" \
    --find-links "$root/flashmoe/wheels" --dest "$root/flashmoe/wheels" \
    "$root"/flashmoe/wheels/flashmoe_ssd-*.whl gguf hypothesis pytest pytest-timeout
[ -e "$root/flashmoe/venv" ] || inside python3 -m venv /flashmoe/venv
inside pip install --quiet --no-index --find-links /flashmoe/wheels --force-reinstall --no-deps flashmoe-ssd
inside pip install --quiet --no-index --find-links /flashmoe/wheels flashmoe-ssd gguf hypothesis pytest pytest-timeout
rm -rf "$root/flashmoe/tests"
cp -r "$source/tests" "$source/pyproject.toml" "$root/flashmoe/"

run() { echo "\$ $*"; inside "$@"; }
cd /
run uname -m
# what it compiles is kept: in an emulator that takes longer than the self-test may that other commands start
run python -m flashmoe.tools.self_test \
    "$(inside python -c 'from flashmoe.engines.llamacpp.library import find_library; print(find_library())')"
run flashmoe doctor
run flashmoe run demo --cache 25% --temp 0 -n 32 --chat -p "What is a mixture of experts?"
run sh -c 'cd /flashmoe && exec python -m pytest -o timeout=3000 tests/storage tests/engines \
    -k "test_direct or test_reader or test_library or logits_equal_stock and (olmoe or gpt-oss or qwen2moe)"'
