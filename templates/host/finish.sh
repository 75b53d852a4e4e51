# After the packages of a host are installed: one kernel in its place, no modules but the written
# list, nothing of the written list of removals, the package database where /var does not hide it.
set -eu
host=/run/pipeline/host
modules=/usr/lib/modules
umask 022

if [ -e $host/kernel/vmlinuz ]; then
  release=$(cat $host/kernel/release)
  mkdir -p "$modules/$release"
  if [ -d $host/kernel/modules ]; then
    cp -rL --no-preserve=ownership $host/kernel/modules/. "$modules/$release/"
  fi
  rm -rf "$modules/$release/build" "$modules/$release/source"
  install -m 0644 $host/kernel/vmlinuz "$modules/$release/vmlinuz"
fi
for image in /boot/vmlinuz-*; do
  [ -e "$image" ] || continue
  release=${image#/boot/vmlinuz-}
  mkdir -p "$modules/$release"
  mv "$image" "$modules/$release/vmlinuz"
  if [ -e "/boot/config-$release" ]; then mv "/boot/config-$release" "$modules/$release/config"; fi
done
kernels=$(for image in $modules/*/vmlinuz; do [ -e "$image" ] && basename "$(dirname "$image")" || true; done)
case $(echo "$kernels" | grep -c .) in
  1) ;;
  0) echo "error: no kernel was installed" >&2; exit 1 ;;
  *) echo "error: a host has one kernel, and these were installed:" $kernels >&2; exit 1 ;;
esac
release=$kernels

if [ -d "$modules/$release/kernel" ] && ! grep -qx all $host/modules; then
  depmod "$release"
  # The wanted names and what modules.dep says they need, and everything else is removed.
  sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' $host/modules.txt $host/modules >/tmp/wanted
  awk '
    function plain(path, name) { name = path; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name); return name }
    FNR == NR { gsub(/-/, "_"); if (sub(/\*$/, "")) start[$0] = 1; else wanted[$0] = 1; next }
    { path = $1; sub(/:$/, "", path); name = plain(path); of[name] = path; needs[path] = ""
      for (i = 2; i <= NF; i++) needs[path] = needs[path] " " $i }
    END {
      for (name in of) {
        keep = name in wanted
        for (prefix in start) if (index(name, prefix) == 1) keep = 1
        if (keep) todo[++count] = of[name]
      }
      for (at = 1; at <= count; at++) {
        if (todo[at] in kept) continue
        kept[todo[at]] = 1
        number = split(needs[todo[at]], below, " ")
        for (i = 1; i <= number; i++) todo[++count] = below[i]
      }
      for (path in kept) print path
    }' /tmp/wanted "$modules/$release/modules.dep" | sort >/tmp/kept
  [ -s /tmp/kept ] || { echo "error: no module of the list is in this kernel" >&2; exit 1; }
  (cd "$modules/$release" && find kernel -type f -name '*.ko*' | sort) >/tmp/there
  comm -13 /tmp/kept /tmp/there | (cd "$modules/$release" && tr '\n' '\0' | xargs -0 -r rm --)
  find "$modules/$release/kernel" -depth -type d -empty -delete
  # A module that was asked for by name and is not there is worth a word.
  sed -e '/^$/d' $host/modules | while read -r name; do
    plain=$(echo "$name" | tr - _)
    if ! tr - _ </tmp/kept | grep -q "/$plain\.ko" && ! tr - _ <"$modules/$release/modules.builtin" | grep -q "/$plain\.ko"; then
      echo "warning: the kernel $release has no module \`$name\`"
    fi
  done
fi
depmod "$release"

sed -e '/^#/d' -e '/^$/d' -e 's/ *|.*//' $host/removed.txt | while read -r pattern; do
  rm -rf -- $pattern
done
# The licences stay.
if [ -d /usr/share/doc ]; then
  find /usr/share/doc -mindepth 2 ! -type d ! -name copyright -delete
  find /usr/share/doc -depth -mindepth 1 -type d -empty -delete
fi
# Profiles of programs that are not here, and those that only allow a program user namespaces,
# which Debian's kernel allows anyway: each is compiled at boot.
for profile in /etc/apparmor.d/*; do
  [ -f "$profile" ] || continue
  if grep -qE '^profile .*flags=\(unconfined\)' "$profile"; then
    rm -f -- "$profile"
    continue
  fi
  programs=$(sed -nE 's/^profile +[^ ]+ +(\/[^ ]+).*/\1/p' "$profile")
  keep=yes
  case $programs in
    '' | *[\{\}\*\?\[@]*) ;;
    *)
      keep=
      for program in $programs; do if [ -e "$program" ]; then keep=yes; fi; done
      ;;
  esac
  [ -n "$keep" ] || rm -f -- "$profile"
done
rm -f /etc/.pwd.lock

rm -rf /var/lib/dpkg/*-old /var/lib/dpkg/lock* /var/lib/dpkg/triggers/Lock /var/lib/dpkg/updates
mkdir -p /usr/lib/pipeline
cp -a /var/lib/dpkg /usr/lib/pipeline/dpkg
mkdir -p /usr/lib/pipeline/dpkg/updates
rm -rf /var/lib/dpkg
ln -s ../../usr/lib/pipeline/dpkg /var/lib/dpkg
