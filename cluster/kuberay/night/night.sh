# What a night does: list the bucket anew, then classify the rows that this model has not labelled yet.
# Run again, it continues: a finished manifest is replaced whole, a finished unit is left alone.
set -euo pipefail
imgbatch manifest build s3://BUCKET/images/ --output s3://BUCKET/manifest.parquet --overwrite
imgbatch classify --config /etc/imgbatch/night.yaml --skip-existing
imgbatch verify s3://BUCKET/labels
