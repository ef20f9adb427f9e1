#!/usr/bin/env bash
# A Python with onnxruntime for ARM64, emulated: FOLDER/bin/python. Called by ci/client with FOLDER and a
# file of requirements.
# On Debian, x86-64: its packages are unpacked into FOLDER; nothing is installed. qemu of Debian 12 crashes on
# importing onnxruntime, so it is Debian 13's.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$1/bin"
folder=$(realpath "$1")
requirements=$2
key=/usr/share/keyrings/debian-archive-keyring.gpg
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
mkdir -p "$state/lists/partial" "$state/cache/archives/partial"

unpack() {  # suite, architecture, where, packages: as apt checks them
  local suite=$1 architecture=$2 where=$3
  shift 3
  echo "deb [signed-by=$key] http://deb.debian.org/debian $suite main" > "$state/sources.list"
  local options=(-qq -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache" -o Dir::State::status=/dev/null
    -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$state" && apt-get "${options[@]}" download "$@")
  for package in "$state"/*.deb; do dpkg -x "$package" "$where"; done
  rm "$state"/*.deb
}
unpack trixie amd64 "$folder/qemu" qemu-user
unpack bookworm arm64 "$folder/root" libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 \
  libssl3 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal
"${PYTHON:-python3}" -m pip install --quiet --target "$folder/site" --only-binary=:all: --python-version 3.11 \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
  --requirement "$requirements"
cat > "$folder/bin/python" <<END
#!/bin/sh
exec "$folder/qemu/usr/bin/qemu-aarch64" -L "$folder/root" -E "PYTHONPATH=$folder/site" \\
  "$folder/root/usr/bin/python3.11" "\$@"
END
chmod +x "$folder/bin/python"
