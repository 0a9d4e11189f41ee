#!/usr/bin/env bash
# The wheel as a user has it, away from this checkout: compress, evaluate, publish on a hub of this machine, load elsewhere.
#
#   bash eval/wheel_walkthrough.sh [FOLDER]     default: a temporary one; two environments of 1 GB each are made in it
#
# `maker` has the wheel with its demo extra, `user` the wheel alone. The model is the small one of the notebooks, which is
# trained on the way: minutes on two cores, beside the installations.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
home=${1:-$(mktemp -d)}
mkdir -p "$home" && cd "$home"
unset PYTHONPATH

[ -e dist ] || python3 -m build --outdir dist "$repo"
for env in maker user; do
    [ -x $env/bin/pip ] || python3 -m venv $env
    $env/bin/pip install --quiet torch==2.13.0
done
maker/bin/pip install --quiet "$(ls dist/*.whl)[demo]"
user/bin/pip install --quiet dist/*.whl

rm -f hub.url
cp "$repo/notebooks/small.py" "$repo/tests/hub_server.py" .
cat > reverse.yaml <<'END'
model: runs/small/model
task: runs/small/reverse.jsonl
data: {validation: 60, test: 100}
decompose: {examples: 64}
prune: {size: 4x, multiple_of: 4}
heal: {steps: 60}
END
python3 -c 'import hub_server, time; print(hub_server.Hub().url, flush=True); time.sleep(86400)' > hub.url &
trap "kill $!" EXIT
until [ -s hub.url ]; do sleep 0.1; done
export HF_ENDPOINT=$(cat hub.url) HF_TOKEN=hf_owner HF_HOME=hub HF_HUB_OFFLINE=0 HF_HUB_DISABLE_XET=1 TQDM_DISABLE=1

set -x
maker/bin/python -c 'import small; small.parent(); small.data(["reverse"])'
maker/bin/basis-select run reverse.yaml
maker/bin/basis-select inspect runs/reverse/final | tail -4
maker/bin/basis-select verify runs/reverse/final
maker/bin/basis-select eval runs/reverse/final --tasks runs/small/reverse.jsonl --against runs/small/model --limit 100
maker/bin/basis-select push runs/reverse me/reverser --base org/base --license apache-2.0
HF_HOME=elsewhere user/bin/python - <<'END'
import basis_select as bs

print(bs.__file__)
model, tokenizer = bs.load("me/reverser")
ids = tokenizer("reverse: gabed >", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True))
print(bs.sizes(model))
END
