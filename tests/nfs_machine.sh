#!/bin/bash
# A machine of its own (User-Mode Linux: a kernel that runs as a process, as init), with an NFS server and two clients that are as
# two machines: each has a network, a name and a mount of its own. Its root is this machine's. What is to be run there is in
# NFS_JOB, a script that finds the mounts in /run/one and /run/two, and how to run on either in ONE and TWO.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
end() { sync; echo o > /proc/sysrq-trigger; sleep 60; }
trap end EXIT
set -e
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib/nfs
mkdir -p /run/netns /run/export /run/one /run/two /run/tmp /run/modules /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
ip link set lo up
mkdir -p /run/modules/lib/modules
ln -s "/usr/lib/uml/modules/$(uname -r)" "/run/modules/lib/modules/$(uname -r)"
for module in veth nfsd nfs nfsv4; do modprobe -d /run/modules "$module"; done
mount -t rpc_pipefs sunrpc /var/lib/nfs/rpc_pipefs
mount -t nfsd nfsd /proc/fs/nfsd
mount -t tmpfs -o size=1G tmpfs /run/export
exportfs -o rw,fsid=0,no_root_squash,insecure,no_subtree_check,sync '*:/run/export'
rpc.mountd -V 4
rpc.nfsd -N 3 -V 4.1 -V 4.2 4
number=0
for name in one two; do
  number=$((number + 1))
  ip netns add "$name"
  ip link add "to-$name" type veth peer name eth0 netns "$name"
  ip addr add "10.9.$number.1/24" dev "to-$name"
  ip link set "to-$name" up
  ip -n "$name" addr add "10.9.$number.2/24" dev eth0
  ip -n "$name" link set eth0 up
  ip -n "$name" link set lo up
  there="unshare --uts sh -c 'hostname machine-$name && exec nsenter --net=/run/netns/$name \"\$@\"' --"
  eval "$there mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,retrans=2 10.9.$number.1:/ /run/$name"
  declare -x "${name^^}=$there"
done
grep nfs4 /proc/mounts
TMPDIR=/run/tmp "$NFS_JOB"
