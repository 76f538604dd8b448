#!/bin/sh
# For the demonstration in compose.yaml only: enrols five hospitals with their coordinator and
# approves its study, with the same commands that people type. In life they are different people,
# the words are read aloud over the telephone, and nobody approves without reading the review.
#
#   docker compose build && ./bootstrap.sh && docker compose up --detach
#
# To begin again: docker compose down --volumes && rm -r demo secrets
set -eu
cd "$(dirname "$0")"
hospitals="st-mary north-general lakeside riverside old-town"
records=../configs/data/synthetic-labs.csv

if [ -e demo ] || [ -e secrets ]; then
    echo "demo or secrets is here already; to begin again see the head of $0" >&2
    exit 1
fi

# Runs one command line in a container of a service, which is thrown away afterwards.
run() {
    docker compose -f compose.yaml -f bootstrap.yaml run --rm --no-deps -T "$@" </dev/null
}
server() { run coordinator server "$@" --config /etc/wardround/coordinator.yaml; }
client() {
    service=$1
    shift
    run "$service" client "$@" --config /etc/wardround/site.yaml
}

# Nobody else on this machine looks into the two folders; what is in them is mounted, and read
# by the users of the containers.
umask 022
mkdir -m 0700 demo secrets
mkdir -m 0777 demo/exchange
chmod 0777 demo/exchange
number=0
for hospital in $hospitals; do
    mkdir "demo/$hospital"
    sed "s/^site: SITE\$/site: $hospital/" site.yaml >"demo/$hospital/site.yaml"
    # Every fifth patient, with all of that patient's records.
    awk -F, -v mine="$number" '
        NR == 1 { print; next }
        !($1 in place) { place[$1] = patients++ % 5 }
        place[$1] == mine
    ' "$records" >"demo/$hospital/records.csv"
    number=$((number + 1))
done

echo "-- the coordinator makes its keys"
server init

for hospital in $hospitals; do
    echo "-- $hospital is invited, joins and is admitted"
    server invite "$hospital" --site "$hospital" --out "/exchange/$hospital.invite"
    told=$(client "$hospital" join "/exchange/$hospital.invite" \
        --out "/exchange/$hospital.join" --json)
    words=$(printf '%s\n' "$told" | sed -n 's/.*"words": "\([^"]*\)".*/\1/p')
    server admit "/exchange/$hospital.join" --words "$words"
done

echo "-- the study is built by a data scientist and published by the coordinator"
run st-mary study build /study.yaml --out /exchange/study
server publish /exchange/study
run --entrypoint cp coordinator -r /exchange/study /var/lib/wardround/study

echo "-- what st-mary would read before it approves; the others read the like"
client st-mary review /exchange/study
for hospital in $hospitals; do
    echo "-- $hospital approves"
    client "$hospital" approve /exchange/study --by "demonstration"
done

echo "-- what Prometheus and Grafana need to know"
run --entrypoint cat coordinator /var/lib/wardround/admin.token >secrets/admin.token
od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >secrets/grafana.password

echo "done. Next: docker compose up --detach"
echo "Grafana: http://127.0.0.1:3000, user admin, password in docker/secrets/grafana.password"
