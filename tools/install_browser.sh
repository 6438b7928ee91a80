#!/usr/bin/env bash
# What the tests of pages need, where it is missing: Chromium from Debian's packages, axe-core from npm.
#
# tools/install_browser.sh [CACHE]     CACHE (default .cache) gets axe-core/axe.min.js
#
# apt-get needs root. Where something cannot be installed, the tests of pages are skipped, and both say so.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
cache=${1:-.cache}
axe_version=4.14.1

fail() {
    echo "install_browser: $1" >&2
    exit 0
}

if ! command -v chromium > /dev/null; then
    [ "$(id -u)" = 0 ] || fail "chromium is missing, and apt-get needs root: sudo apt-get install chromium"
    command -v apt-get > /dev/null || fail "chromium is missing, and there is no apt-get: install it by other means"
    { timeout 300 apt-get -o Acquire::Retries=3 update -qq && timeout 900 apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends chromium \
        fonts-dejavu-core > /dev/null; } || fail "apt-get could not install chromium"
fi
if [ ! -s "$cache/axe-core/axe.min.js" ]; then
    command -v npm > /dev/null || fail "npm is missing, which axe-core comes from: install it"
    mkdir -p "$cache/axe-core"
    packed=$(mktemp -d)
    trap 'rm -rf "$packed"' EXIT
    (cd "$packed" && timeout 120 npm pack --silent "axe-core@$axe_version" > /dev/null &&
        tar -xzf axe-core-*.tgz) || fail "npm could not fetch axe-core $axe_version"
    cp "$packed/package/axe.min.js" "$packed/package/LICENSE" "$cache/axe-core/"
fi
