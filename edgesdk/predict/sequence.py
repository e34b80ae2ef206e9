"""Layer tables of transformers: vision, text, speech; and the shapes of language models.

Shapes are those of the models' own configuration files on the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgesdk.predict.layers import Net


def encoder(n: Net, tokens: int, d: int, depth: int, ffn: int, heads: int, small: int = 0) -> Net:
    """`depth` pre-norm transformer blocks over `tokens`; `small` extra element-wise operators a block where softmax, GELU
    and norms are written out."""
    for _ in range(depth):
        n.plain(float(tokens * d), 2)
        for _ in range(3):
            n.matmul(tokens, d, d)
        n.bmm(heads, tokens, d // heads, tokens).plain(float(heads * tokens * tokens), 2).bmm(heads, tokens, tokens, d // heads)
        n.matmul(tokens, d, d).plain(float(tokens * d), 3)
        n.matmul(tokens, d, ffn).plain(float(tokens * ffn)).matmul(tokens, ffn, d).plain(float(tokens * d), 2)
        for _ in range(small):
            n.plain(float(tokens * d))
    return n


def vit(size: int = 224, patch: int = 16, d: int = 768, depth: int = 12, heads: int = 12) -> Net:
    """Vision transformer (arXiv 2010.11929)."""
    n = Net(3, size, size).conv(d, patch, patch)
    tokens = n.h * n.w + 1
    return encoder(n, tokens, d, depth, 4 * d, heads).matmul(1, d, 1000)


def swin(dims: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2), size: int = 224, window: int = 7) -> Net:
    """Swin (arXiv 2103.14030); its window shuffles are copies."""
    n = Net(3, size, size).conv(dims, 4, 4)
    d, t = dims, n.h * n.w
    for i, reps in enumerate(depths):
        w2 = window * window
        for _ in range(reps):
            heads = d // 32
            n.plain(float(t * d), 2).plain(float(t * d), 1, "elem").plain(float(t * d), 1, "elem").matmul(t, d, 3 * d)
            n.bmm(heads * t // w2, w2, 32, w2).plain(float(heads * t * w2), 2).plain(float(heads * t * w2)).bmm(heads * t // w2, w2, w2, 32)
            n.matmul(t, d, d).plain(float(t * d), 1, "elem").plain(float(t * d), 1, "elem").plain(float(t * d), 3)
            n.matmul(t, d, 4 * d).plain(float(t * 4 * d)).matmul(t, 4 * d, d).plain(float(t * d), 2)
        if i < len(depths) - 1:
            t //= 4
            n.plain(float(t * 4 * d), 2).matmul(t, 4 * d, 2 * d)
            d *= 2
    return n.plain(float(t * d)).matmul(1, d, 1000)


def bert(tokens: int = 128, d: int = 768, depth: int = 12, ffn: int = 3072, heads: int = 12, vocab: int = 0) -> Net:
    """BERT and its kin; `vocab` adds a language-model head."""
    n = encoder(Net(d, 1, tokens), tokens, d, depth, ffn, heads)
    return n.matmul(tokens, d, vocab) if vocab else n


def mobilebert(tokens: int = 384, vocab: int = 30522) -> Net:
    """MobileBERT (arXiv 2004.02984): 24 bottleneck blocks of 128 with four feed-forward networks each;
    its norms are a multiplication and an addition, its activations ReLU."""
    n = Net(512, 1, tokens)
    for _ in range(24):
        n.matmul(tokens, 512, 128).plain(tokens * 128.0, 1, "elem").matmul(tokens, 512, 128).plain(tokens * 128.0, 1, "elem")
        n.matmul(tokens, 128, 128).matmul(tokens, 128, 128).matmul(tokens, 512, 128)
        n.bmm(4, tokens, 32, tokens).plain(4.0 * tokens * tokens, 2).bmm(4, tokens, tokens, 32).matmul(tokens, 128, 128).plain(
            tokens * 128.0, 2, "elem"
        )
        for _ in range(4):
            n.matmul(tokens, 128, 512).plain(tokens * 512.0, 1, "elem").matmul(tokens, 512, 128).plain(tokens * 128.0, 2, "elem")
        n.matmul(tokens, 128, 512).plain(tokens * 512.0, 2, "elem")
    return n.matmul(tokens, 512, vocab) if vocab else n


WHISPER = {
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 32, 20),
    "turbo": (1280, 32, 20),
}


def whisper(kind: str, decoder: bool, steps: int = 1) -> Net:
    """Whisper (arXiv 2212.04356): the encoder of 30 s of sound, or `steps` decoder steps with the cross cache ready."""
    d, depth, heads = WHISPER[kind]
    if not decoder:
        n = Net(80, 1, 3000).conv(d, (1, 3)).elem().conv(d, (1, 3), 2).elem()
        n.w, n.h = 1500, 1
        return encoder(n, 1500, d, depth, 4 * d, heads)
    depth = 4 if kind == "turbo" else depth
    n = Net(d, 1, 1)
    for _ in range(steps):
        for _ in range(depth):
            n.plain(float(d), 2)
            for _ in range(3):
                n.matmul(1, d, d)
            n.bmm(heads, 1, d // heads, 200).plain(heads * 200.0).bmm(heads, 1, 200, d // heads).matmul(1, d, d).plain(float(d), 3).matmul(
                1, d, d
            )
            n.bmm(heads, 1, d // heads, 1500).plain(heads * 1500.0).bmm(heads, 1, 1500, d // heads).matmul(1, d, d).plain(float(d), 3)
            n.matmul(1, d, 4 * d).plain(4.0 * d).matmul(1, 4 * d, d).plain(float(d), 2)
        n.matmul(1, d, 51865)
    return n


@dataclass(frozen=True)
class Language:
    """A decoder-only language model: `weights` are read once a token (the input embedding is not, the output head is)."""

    layers: int
    d: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = True
    head: int = 0  # size of one head; 0: d / heads

    @property
    def block_weights(self) -> float:
        size = self.head or self.d // self.heads
        attention = self.d * size * (2 * self.heads + 2 * self.kv_heads)
        return float(self.layers * (attention + (3 if self.gated else 2) * self.d * self.ffn))

    @property
    def head_weights(self) -> float:
        return float(self.d * self.vocab)

    @property
    def weights(self) -> float:
        return self.block_weights + self.head_weights

    def cache_elements(self, tokens: int) -> float:
        """Elements of the key and value caches at `tokens`."""
        return 2.0 * self.layers * self.kv_heads * (self.head or self.d // self.heads) * tokens


LANGUAGE: dict[str, Language] = {
    "tinyllama1.1b": Language(22, 2048, 5632, 32, 4, 32000),
    "llama2-7b": Language(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": Language(40, 5120, 13824, 40, 40, 32000),
    "llama3-8b": Language(32, 4096, 14336, 32, 8, 128256),
    "llama3.2-1b": Language(16, 2048, 8192, 32, 8, 128256),
    "llama3.2-3b": Language(28, 3072, 8192, 24, 8, 128256),
    "llama3-70b": Language(80, 8192, 28672, 64, 8, 128256),
    "qwen1.5-0.5b": Language(24, 1024, 2816, 16, 16, 151936),
    "qwen1.5-1.8b": Language(24, 2048, 5504, 16, 16, 151936),
    "qwen1.5-4b": Language(40, 2560, 6912, 20, 20, 151936),
    "qwen1.5-7b": Language(32, 4096, 11008, 32, 32, 151936),
    "qwen2.5-0.5b": Language(24, 896, 4864, 14, 2, 151936),
    "qwen2.5-1.5b": Language(28, 1536, 8960, 12, 2, 151936),
    "qwen2.5-3b": Language(36, 2048, 11008, 16, 2, 151936),
    "qwen2.5-7b": Language(28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-14b": Language(48, 5120, 13824, 40, 8, 152064),
    "qwen2.5-32b": Language(64, 5120, 27648, 40, 8, 152064),
    "qwen3-0.6b": Language(28, 1024, 3072, 16, 8, 151936, head=128),
    "qwen3-1.7b": Language(28, 2048, 6144, 16, 8, 151936, head=128),
    "qwen3-4b": Language(36, 2560, 9728, 32, 8, 151936, head=128),
    "qwen3-8b": Language(36, 4096, 12288, 32, 8, 151936),
    "gemma-2b": Language(18, 2048, 16384, 8, 1, 256000, head=256),
    "gemma-7b": Language(28, 3072, 24576, 16, 16, 256000, head=256),
    "gemma2-2b": Language(26, 2304, 9216, 8, 4, 256000, head=256),
    "gemma2-9b": Language(42, 3584, 14336, 16, 8, 256000, head=256),
    "gemma3-270m": Language(18, 640, 2048, 4, 1, 262144, head=256),
    "gemma3-1b": Language(26, 1152, 6912, 4, 1, 262144, head=256),
    "gemma3-4b": Language(34, 2560, 10240, 8, 4, 262208, head=256),
    "gemma3-12b": Language(48, 3840, 15360, 16, 8, 262208, head=256),
    "phi2-2.7b": Language(32, 2560, 10240, 32, 32, 51200, gated=False),
    "phi3-3.8b": Language(32, 3072, 8192, 32, 32, 32064),
    "phi4-14b": Language(40, 5120, 17920, 40, 10, 100352),
    "mistral-7b": Language(32, 4096, 14336, 32, 8, 32000),
    "smollm-135m": Language(30, 576, 1536, 9, 3, 49152),
    "smollm-360m": Language(32, 960, 2560, 15, 5, 49152),
    "smollm-1.7b": Language(24, 2048, 8192, 32, 32, 49152),
    "stablelm-1.6b": Language(24, 2048, 5632, 32, 32, 100352),
    "stablelm-3b": Language(32, 2560, 6912, 32, 32, 50304),
    "deepseekr1-1.5b": Language(28, 1536, 8960, 12, 2, 151936),
    "deepseekr1-7b": Language(28, 3584, 18944, 28, 4, 152064),
    "deepseekr1-8b": Language(32, 4096, 14336, 32, 8, 128256),
    "deepseekr1-14b": Language(48, 5120, 13824, 40, 8, 152064),
    "granite3-2b": Language(40, 2048, 8192, 32, 8, 49155),
    "granite3-8b": Language(40, 4096, 12800, 32, 8, 49155),
    "falcon3-1b": Language(18, 2048, 8192, 8, 4, 131072, head=256),
    "orca-3b": Language(26, 3200, 8640, 32, 32, 32000),
}
