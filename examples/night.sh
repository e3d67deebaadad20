#!/usr/bin/env bash
# One night on a machine without a CI system: what the systemd unit and the line of cron start.
#
# Pulls, runs `tox -e nightly`, and publishes page, trend, results and JUnit into $base/published whatever the night
# came to. Exit code: the night's, 75 where another night is under way, 124 where it took too long.
set -euo pipefail

base=${QUANTPROOF_BASE:-/srv/quantproof} # CHANGE 1: a folder that outlives the checkout, of the user whose night it is
limit=${QUANTPROOF_LIMIT:-5h}            # CHANGE 2: no night takes longer
export QUANTPROOF_HISTORY="$base/history" QUANTPROOF_BENCHMARKS="$base/benchmarks" TOX_WORK_DIR="$base/tox"
export PATH="$base/tox/quantproof-gpu/bin:$base/tools/bin:$PATH"

publish() { # as much as there is: a night that died early has no results, and its trend says so
    local code=0
    mkdir -p reports/out
    python -m reports trend -o reports/out/trend.html || code=1
    python -m reports render reports/out/results.json --format junit -o reports/out/junit.xml || code=1
    python -m reports show reports/out/results.json || code=1
    rm -rf "$base/published.new" && cp -r reports/out "$base/published.new" || return 1
    rm -rf "$base/published" && mv "$base/published.new" "$base/published" || return 1
    return "$code"
}

main() { # read whole before it runs: pulling may change this very file
    cd "$(dirname "$0")/.."
    exec 9>"$base/night.lock" # held by all that the night starts, until the last of it has ended
    if ! flock --nonblock 9; then
        echo "night.sh: another night is under way, or has left a process behind: see fuser $base/night.lock" >&2
        exit 75
    fi
    git pull --quiet --ff-only
    rm -rf reports/out .cache # tonight's page must be tonight's; artifacts of every commit would fill the disk
    local code=0
    # CHANGE 3: nightly-cpu without a GPU; then also quantproof/bin instead of quantproof-gpu/bin above
    timeout --signal=INT --kill-after=5m "$limit" tox -e nightly || code=$?
    publish || code=$((code ? code : 1))
    exit "$code"
}

main "$@"
