#!/bin/bash
# Run crun where a machine has both versions of control groups, which it does not support: in a mount namespace that has
# only the second one.
#   unshare --mount crun.sh ARGUMENT...
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
exec crun --cgroup-manager=disabled "$@"
