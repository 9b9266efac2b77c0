# What a night does: list the bucket once, then classify the rows that this model has not labelled yet.
# Run again, as on another cluster after the head was lost, it continues: the listing has the night's date (UTC) for a
# name and is not made twice, so that the rows are the same, and a finished unit is left alone. Schedule and deadlines
# end a night, its second cluster too, before midnight UTC. Where yours do not, or for a second night on a day, set
# NIGHT in the entrypoint of rayjob.yaml.
set -euo pipefail
manifest=s3://BUCKET/manifests/${NIGHT:-$(date --utc +%F)}.parquet
imgbatch manifest build s3://BUCKET/images/ --output "$manifest" || imgbatch manifest check "$manifest" --sample 0
imgbatch classify --config /etc/imgbatch/night.yaml --manifest "$manifest" --skip-existing
imgbatch verify s3://BUCKET/labels
