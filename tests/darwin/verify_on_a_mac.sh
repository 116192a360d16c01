#!/bin/bash
# Runs the tests that need a real Mac and writes a report that can be sent back.
#
#   tests/darwin/verify_on_a_mac.sh [FOLDER]
#
# Needs macOS 12 or newer, Python 3.11 or newer (PYTHON names another), and for the GPU tests the command line tools
# of Xcode. Run it as an ordinary user, in a session of that user's own (not over ssh, where the GPU may be out of
# reach), and outside of any sandbox. It makes a virtual environment in a temporary folder, touches nothing but
# temporary folders, and ends every process that it started. FOLDER (default: the current one) gets
# sandfleet-mac-report-<time>/ with report.txt (to read), report.json (the facts) and pytest.txt (all that was said).
#
# Exit code: 0 when every test passed or was skipped with a reason, 1 when one failed, 2 when it could not begin.
set -u

fail() {
    printf '%s\n' "$1" >&2
    exit 2
}

checkout=$(cd "$(dirname "$0")/../.." && pwd) || fail "cannot find the checkout this script belongs to"
target=${1:-$PWD}
[ -d "$target" ] || fail "$target is no folder"
[ "$(uname -s)" = Darwin ] || fail "this is no Mac"
[ "$(id -u)" -ne 0 ] || fail "run this as an ordinary user, not as root"

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3"

report="$target/sandfleet-mac-report-$(date -u +%Y%m%dT%H%M%SZ)"
mkdir -m 700 "$report" || fail "cannot make $report"
work=$(mktemp -d "${TMPDIR:-/tmp}/sandfleet-verify.XXXXXX") || fail "cannot make a temporary folder"
trap 'rm -rf "$work"' EXIT

echo "installing into a virtual environment (once for this run) ..."
if ! "$python" -m venv "$work/venv" >"$report/install.txt" 2>&1 ||
    ! "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$checkout/constraints.txt" "${checkout}[dev]" >>"$report/install.txt" 2>&1; then
    tail -n 20 "$report/install.txt" >&2
    fail "the installation failed; see $report/install.txt"
fi

echo "running the tests of a real Mac (a few minutes) ..."
(
    cd "$checkout" || exit 2
    SANDFLEET_MAC_REPORT="$report/report.json" "$work/venv/bin/python" -m pytest \
        -m darwin -p no:cacheprovider -n 0 -ra --tb=short tests/darwin
) >"$report/pytest.txt" 2>&1
code=$?

{
    echo "sandfleet on a real Mac, $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo
    sw_vers
    uname -m
    sysctl -n hw.model machdep.cpu.brand_string hw.memsize 2>/dev/null
    printf 'translated by Rosetta: %s\n' "$(sysctl -n sysctl.proc_translated 2>/dev/null || echo no)"
    printf 'system integrity protection: %s\n' "$(csrutil status 2>/dev/null | head -n 1)"
    "$work/venv/bin/python" -V
    printf 'commit: %s\n' "$(git -C "$checkout" rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
    "$work/venv/bin/python" "$checkout/tests/darwin/summary.py" "$report/report.json"
    echo
    tail -n 1 "$report/pytest.txt"
} >"$report/report.txt" 2>&1

cat "$report/report.txt"
echo
# pytest: 0 all passed, 5 nothing was collected.
if [ "$code" -gt 1 ]; then
    fail "the tests did not run; see $report/pytest.txt"
fi
echo "the report is in $report; please send the folder back (read it first: it names paths of this machine)"
exit "$code"
