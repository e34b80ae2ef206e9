"""The shell scripts that stand in for the agent: plain `sh` with what toybox and busybox have. Arguments are positional, as in `transport.scripts`."""

from __future__ import annotations

HOLD = """
e=$({ mkdir -p "$1" && (: >> "$1/lease"); } 2>&1) || { echo "cannot $e"; exit 0; }
if command -v flock >/dev/null 2>&1; then
  exec 9>>"$1/lease"
  if ! flock -n 9 9>&9; then echo "held $(cat "$1/lease")"; exit 0; fi
  printf %s "$2" > "$1/lease"; echo yours; exec cat > /dev/null 9>&9
fi
d="$1/lease.d"; b=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
tries=0
while ! mkdir "$d" 2>/dev/null; do
  o=$(cat "$d/owner" 2>/dev/null); p=${o%% *}
  if [ "$o" = "$p $b" ] && grep -q edgesdk-hold "/proc/$p/cmdline" 2>/dev/null; then echo "held $(cat "$d/who" 2>/dev/null)"; exit 0; fi
  tries=$((tries + 1)); if [ -z "$o" ] && [ "$tries" -lt 5 ]; then sleep 1; continue; fi
  [ "$tries" -lt 20 ] || { echo "held by somebody who cannot be told"; exit 0; }
  mv "$d" "$d.$$" 2>/dev/null && rm -rf "$d.$$"
done
trap 'rm -rf "$d"; exit 0' HUP INT TERM
echo "$$ $b" > "$d/owner"; printf %s "$2" > "$d/who"; echo yours; cat > /dev/null
rm -rf "$d"
"""
"""$1 root, $2 who: the lock of `edgesdk.lease` without Python, held until the input ends. With `flock` it is the very same lock; without, a folder
whose owner is a process of this boot that is still there, so that one that a crash left behind is taken over. `9>&9`: Android's mksh gives
descriptors above 2 to no command that is not told to take them."""

WHERE = 'case "$1" in /*) echo "$1";; *) echo "$(pwd)/$1";; esac; uname -m'
"""$1 root → the root from the top, and the machine."""

EXECUTABLE = 'chmod 755 "$1"'

RUN = """
d=$1; poll=$2; shift 2
mkdir -p "$d" && cd "$d" || exit 73
case "$1" in */*) LD_LIBRARY_PATH="${1%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; export LD_LIBRARY_PATH;; esac
"$@" &
p=$!; k=; n=0
if [ "$poll" = 1 ]; then
  while h=$(grep VmHWM "/proc/$p/status" 2>/dev/null); do k=$h; n=$((n + 1)); sleep 0.02 2>/dev/null || sleep 1; done
fi
wait $p; c=$?
[ -z "$k" ] || { set -- $k; echo "edgesdk-peak $2"; }
if command -v logcat >/dev/null 2>&1; then logcat -d -v brief --pid=$p -s ExecuTorch >&2; fi
exit $c
"""
"""$1 scratch folder, $2 1: look at the process's peak memory meanwhile, then the command. Libraries beside the program are found; on Android
ExecuTorch's log goes to logcat and is fetched from there."""

DIAGNOSE = """
[ -f "$1" ] && echo "there yes"
s=$(getenforce 2>/dev/null) && echo "selinux $s"
m=$(df -P "${1%/*}" 2>/dev/null | tail -n 1); m=${m##* }
while read -r _ at _ options _; do [ "$at" = "$m" ] && { echo "mount $at"; echo "options $options"; }; done < /proc/mounts
if command -v logcat >/dev/null 2>&1; then logcat -d -t 200 -s lowmemorykiller lmkd 2>/dev/null | grep -i kill | tail -n 1 | while read -r l; do echo "lmkd $l"; done; fi
exit 0
"""
"""$1 a program that did not run → lines `name value`."""

FACTS = """
echo "machine $(uname -m)"; echo "system $(uname -s) $(uname -r)"
for p in ro.product.manufacturer ro.product.model ro.build.version.release ro.product.cpu.abi ro.kernel.qemu ro.boot.qemu; do
  v=$(getprop $p 2>/dev/null) && [ -n "$v" ] && echo "$p $v"
done
for f in /proc/device-tree/model /proc/device-tree/compatible /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_name; do
  [ -r $f ] && echo "$f $(tr '\\000' ' ' < $f)"
done 2>/dev/null
while IFS=: read -r k v; do case $k in "model name"*|Hardware*|"CPU part"*|vendor_id*|flags*) echo "cpuinfo $k:$v";; esac; done < /proc/cpuinfo
for c in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
  v=$(cat "$c/scaling_cur_freq" 2>/dev/null) && echo "khz $v"; v=$(cat "$c/scaling_governor" 2>/dev/null) && echo "governor $v"
done
for z in /sys/class/thermal/thermal_zone*; do v=$(cat "$z/temp" 2>/dev/null) && echo "millicelsius $v $(cat "$z/type" 2>/dev/null)"; done
exit 0
"""
"""→ lines `name value`; what may not be read is left out."""
