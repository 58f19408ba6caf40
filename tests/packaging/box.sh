#!/bin/bash
# Run a command in an unpacked image as `docker run --read-only --cap-drop ALL --user 10001` does:
#   unshare --mount --pid --fork --kill-child box.sh ROOT STATE CONFIG COMMAND...
set -e
root=$1 state=$2 config=$3
shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/tmp"
mount --bind "$state" "$root/var/lib/cairn"
mount --bind "$config" "$root/etc/cairn"
environment=(PATH=/opt/cairn/bin:/usr/local/bin:/usr/bin:/bin XDG_DATA_HOME=/var/lib PYTHONDONTWRITEBYTECODE=1)
exec chroot "$root" /usr/bin/env -i "${environment[@]}" \
  setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --no-new-privs "$@"
