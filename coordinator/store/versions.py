"""Versions of a job's global adapter, as folders that appear whole or not at all.

<data_dir>/jobs/<job>/v000003/global   factors by module (fp64 as computed) and dense tensors
                              views    every (module, rank) view that was ever sent, as of this version
                              state    methods' and tuner's state after the round that made it
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.program.files import digest_of, write_atomic, write_folder
from rankfleet.federated.wire.frame import encode, freeze, open_frame, thaw

CARRY = ".carry"
"""How the carry of a map is named beside its pair."""


class Version:
    """One version, in memory. `views` maps (module, rank) to what devices of that rank were sent."""

    def __init__(
        self,
        number: int,
        pairs: dict[str, LowRank],
        dense: Tensors,
        views: dict[tuple[str, int], LowRank],
        state: dict[str, Any],
    ) -> None:
        self.number, self.pairs, self.dense, self.views, self.state = number, pairs, dense, views, state
        self.carry: dict[str, LowRank] = {}
        """What all devices apply frozen beside the pairs: scale and all."""
        self.digest = ""
        self.saved_views = -1


class Registry:
    """The versions of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        """The folder of a version."""
        return self.folder / f"v{number:06d}"

    def save(self, version: Version) -> str:
        """Write a version; returns the digest of its global adapter."""
        tensors: Tensors = {
            f"{m}.{side}": t for m, p in sorted(version.pairs.items()) for side, t in (("A", p.A), ("B", p.B))
        }
        tensors |= carry_tensors(version.carry)
        data = encode({**tensors, **dict(sorted(version.dense.items()))}, {"version": version.number})
        write_folder(
            self.path(version.number),
            {"global": data, "views": _views(version), "state": freeze(version.state)},
        )
        version.digest, version.saved_views = digest_of(data), len(version.views)
        return version.digest

    def save_views(self, version: Version) -> None:
        """Views that a round made of a version that is on disk already."""
        if version.saved_views != len(version.views):
            write_atomic(self.path(version.number) / "views", _views(version))
            version.saved_views = len(version.views)

    def opened(self, number: int) -> Path:
        """Where the state of an open round lies."""
        return self.folder / f"open{number:06d}"

    def load(self, number: int) -> Version:
        """A version from disk. Raises OSError or WireError where it is damaged."""
        folder = self.path(number)
        tensors, _ = open_frame(folder / "global")
        both = {k[:-2]: LowRank(tensors[f"{k[:-2]}.B"], tensors[k]) for k in tensors if k.endswith(".A")}
        carry = {k.removesuffix(CARRY): p for k, p in both.items() if k.endswith(CARRY)}
        pairs = {k: p for k, p in both.items() if not k.endswith(CARRY)}
        dense = {k: t for k, t in tensors.items() if not k.endswith((".A", ".B"))}
        seen, _ = open_frame(folder / "views")
        views = {}
        for key in seen:
            if key.endswith(".A"):
                module, _, rank = key[:-2].rpartition("@")
                views[module, int(rank)] = LowRank(seen[key[:-2] + ".B"], seen[key])
        version = Version(number, pairs, dense, views, thaw((folder / "state").read_bytes()))
        version.carry = carry
        version.saved_views = len(views)
        version.digest = digest_of((folder / "global").read_bytes())
        return version

    def forget_before(self, number: int, keep: set[int]) -> None:
        """Remove old versions, but for those named."""
        for path in self.folder.glob("v??????"):
            if int(path.name[1:]) < number and int(path.name[1:]) not in keep:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("open??????"):
            if int(path.name[4:]) < number:
                path.unlink(missing_ok=True)


def carry_tensors(carry: Mapping[str, LowRank]) -> Tensors:
    """A carry by tensor name, as versions and devices hold it."""
    return {f"{m}{CARRY}.{side}": t for m, p in sorted(carry.items()) for side, t in (("A", p.A), ("B", p.B))}


def _views(version: Version) -> bytes:
    return encode(
        {
            f"{m}@{r}.{s}": t
            for (m, r), p in sorted(version.views.items())
            for s, t in (("A", p.A), ("B", p.B))
        }
    )
