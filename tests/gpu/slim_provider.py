"""Empty out of a CUDA library what one kind of GPU never loads, so that it compresses well.

    python slim_provider.py LIBRARY.so SLIM.so [--arch 90] [--keep-all]

The GPU code lies in the section .nv_fatbin: containers (magic BA55ED50, a 16-byte header), each with one entry for every
generation of GPU, each entry a header and a payload (a cubin, compressed with zstd). The program holds pointers to the
containers, and the driver takes from one the entry whose header names its own generation. So each container stays where it
is, but holds that entry alone, as if it had been compiled for one generation; what was behind it becomes zeros. Everything
outside the section stays as it is, and the file keeps its length.

Cubins of the wanted generation go where every kernel is for what no graph of ours can call (`UNUSED`: mixture of
experts, weight-only quantized LLMs, decoding with a cache, attention with other heads than 32 or 64 wide or in bf16);
--keep-all keeps them. In their place comes the smallest cubin for another generation, so that a call would end in "no
kernel image": the original has containers without code for the wanted one, too.

Reads names from cubins with the package zstandard; --keep-all needs nothing but Python.
"""

import argparse
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC, CONTAINER = 0xBA55ED50, struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
# kind (1 PTX, 2 cubin), version, bytes of this header, bytes of the payload, of these compressed, ?, minor, major, arch,
# name's offset, name's length, flags, ?, bytes when decompressed
ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
PTX, CUBIN = 1, 2
ZSTD = 0x8000  # among the flags

UNUSED = re.compile(
    rb"GroupProblemShape|MoeFCGemm|fused_moe|onnxruntime3llm"
    rb"|H\d+grp\d+\w*kernel_mha|masked_multihead_attention"
    rb"|Flash_fwd_kernel_traitsILi(96|128|160|192|224|256)E|Flash_fwd_kernel_traits\w*?bfloat16_t"
)


@dataclass(frozen=True)
class Entry:
    """One piece of GPU code: where its header and its payload lie in the file."""

    container: int
    kind: int
    arch: int
    start: int
    payload: int
    end: int
    compressed: int
    decompressed: int
    flags: int


def section(data: bytes | bytearray, wanted: bytes) -> tuple[int, int]:
    """Start and end of a section of a 64-bit ELF file."""
    assert data[:5] == b"\x7fELF\x02", "no 64-bit ELF file"
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if bytes(data[start : data.index(b"\0", start)]) == wanted:
            return offset, offset + length
    raise SystemExit(f"no section {wanted.decode()}")


def containers(data: bytes | bytearray) -> Iterator[tuple[int, int, list[Entry]]]:
    """Start, end and entries of each; between two there may be nothing but zeros."""
    position, last = section(data, b".nv_fatbin")
    while position < last:
        magic, _, header, size = CONTAINER.unpack_from(data, position)
        if magic == 0:
            position += 8
            continue
        assert magic == MAGIC, f"no container at {position:#x}"
        start, position, end = position, position + header, position + header + size
        found = []
        while position < end:
            kind, _, own, payload, compressed, _, _, _, arch, _, _, flags, _, whole = ENTRY.unpack_from(data, position)
            stop = position + own + payload
            found.append(Entry(start, kind, arch, position, position + own, stop, compressed, whole, flags))
            position = stop
        assert position == end, f"entries end at {position:#x}, their container at {end:#x}"
        yield start, end, found
    assert position == last


def kernels(data: bytes | bytearray, entry: Entry) -> set[bytes]:
    """Names of a cubin's kernels, from its sections' names."""
    import zstandard  # type: ignore[import-not-found]  # only where packing is done

    assert entry.kind == CUBIN
    assert entry.flags & ZSTD, f"flags {entry.flags:#x}"
    packed = bytes(data[entry.payload : entry.payload + entry.compressed])
    cubin = zstandard.ZstdDecompressor().decompress(packed, max_output_size=entry.decompressed)
    assert len(cubin) == entry.decompressed
    assert cubin[:4] == b"\x7fELF"
    return set(re.findall(rb"\.text\.([\w.$]+)", cubin))


def report(title: str, found: list[tuple[int, int, list[Entry]]]) -> None:
    print(f"{title}: {len(found)} containers, {sum(len(entries) for _, _, entries in found)} entries")
    sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for _, _, entries in found:
        for entry in entries:
            sizes[entry.arch, entry.kind].append(entry.end - entry.start)
    for (arch, kind), each in sorted(sizes.items()):
        print(f"  {'PTX' if kind == PTX else 'cubin'} for sm_{arch}: {len(each)}, {sum(each) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--keep-all", action="store_true", help="keep every kernel of the wanted generation")
    options = parser.parse_args()
    original = options.source.read_bytes()
    before = list(containers(original))
    report("before", before)
    per_container = Counter(entry.container for _, _, found in before for entry in found if entry.arch == options.arch)
    # More than one (machine code and PTX, say) these builds do not have; which one to take would have to be thought about.
    assert set(per_container.values()) == {1}, f"not one piece of code for sm_{options.arch} in each: leave it as it is"
    others = [entry for _, _, found in before for entry in found if entry.arch > options.arch and entry.kind == CUBIN]
    smallest = min(others, key=lambda entry: entry.end - entry.start)

    data = bytearray(original)
    n_unused = n_without = 0
    for start, end, found in before:
        wanted = next((entry for entry in found if entry.arch == options.arch), None)
        if wanted is None:
            n_without += 1
        elif not options.keep_all:
            names = kernels(original, wanted)
            if names and all(UNUSED.search(name) for name in names):
                n_unused += 1
                wanted = None
        kept = wanted or smallest
        code = original[kept.start : kept.end]
        magic, version, header, _ = CONTAINER.unpack_from(original, start)
        assert start + header + len(code) <= end
        data[start : start + header] = CONTAINER.pack(magic, version, header, len(code))
        data[start + header : end] = code + bytes(end - start - header - len(code))
    print(f"  {n_without} containers have nothing for sm_{options.arch}; in {n_unused} it is nothing that we call")

    after = list(containers(data))
    report("after", after)
    first, last = section(original, b".nv_fatbin")
    assert [start for start, _, _ in after] == [start for start, _, _ in before]
    assert len(data) == len(original)
    assert data[:first] == original[:first]
    assert data[last:] == original[last:]
    options.target.write_bytes(data)


if __name__ == "__main__":
    main()
