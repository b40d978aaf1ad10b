"""The default codec on 300,000 fp32 numbers: bits per number beside the entropy bound, and milliseconds."""

import numpy as np

from rankfleet.federated.methods.codecs.sparse import decode, encode

from .table import interleaved, report


def main() -> None:
    """Densities from everything to 1/64."""
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    rows = []
    for keep in (1.0, 1 / 4, 1 / 16, 1 / 64):
        body, decoded = encode(values, keep)
        sent = decoded[decoded != 0]
        share = len(sent) / len(values)
        _, counts = np.unique(np.rint(127 * sent / np.abs(sent).max()), return_counts=True)
        p = counts / counts.sum()
        index = 0.0 if share >= 1 else -share * np.log2(share) - (1 - share) * np.log2(1 - share)
        times = interleaved(
            {"encode": lambda k=keep: encode(values, k), "decode": lambda b=body: decode(b, values.size)}
        )
        rows.append(
            {
                "keep": keep,
                "bits_per_number": round(8 * len(body) / values.size, 3),
                "bound": round(float(index + share * -(p * np.log2(p)).sum()), 3),
                "against_fp16": round(16 * values.size / (8 * len(body)), 1),
                "encode_ms": round(1e3 * times["encode"], 2),
                "decode_ms": round(1e3 * times["decode"], 2),
            }
        )
    report("codec", rows, numbers=values.size)


if __name__ == "__main__":
    main()
