#!/bin/bash
# Install a wheel in a bare Debian and serve, by the commands of docs/installing.md:
#   unshare --mount --pid --fork --kill-child bare.sh ROOT WHEEL UPSTREAM PORT ADMIN_PORT
# pip reaches its index as outside: with the same certificates, name servers and configuration.
set -e
root=$1 wheel=$2 upstream=$3 port=$4 admin_port=$5
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=0700,size=512m tmpfs "$root/mnt"
mount --bind /etc/ssl/certs "$root/etc/ssl/certs"
cp /etc/resolv.conf "$root/etc/resolv.conf"
[ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$root/mnt/pip.conf"
cp "$wheel" "$root/mnt/"
environment=(PATH=/usr/bin:/bin HOME=/mnt PIP_CONFIG_FILE=/mnt/pip.conf PIP_CERT=/etc/ssl/certs/ca-certificates.crt)
exec chroot "$root" /usr/bin/env -i "${environment[@]}" bash -ec '
  cd /mnt
  python3 -m venv cairn
  cairn/bin/pip install --quiet ./cairn_proxy-*.whl
  exec cairn/bin/cairn serve --upstream "$0" --port "$1" --admin-port "$2"' "$upstream" "$port" "$admin_port"
