"""Sequence models: one family that is every layout, its export as programs with static caches, and the runtime that generates with them.

The contract between the exporter (`export`) and the runtime (`generate`), which both the planner and other runtimes may rely on:

- A bundle holds `sequence.json` (see `card`): the layout, which method has which role and which static sizes, the caches, the special
  tokens and the tokenizer. Methods are named `encode`, `prefill`, `decode`; where there are several lengths, with the lengths behind:
  `encode_64`, `prefill_64`, `decode_64_128` (source, cache), and `…_x4` where a decode takes four tokens at once.
- B is the batch, S the source length, T the slots of a self-attention cache, N the tokens of one call, V the vocabulary,
  K the heads of keys and values, D the size of one head. Masks are added to attention scores: 0 where a position may be seen, else -1e4.

      encode (source int64 [B,S] or features float32 [B,F,frames], source_mask float32 [B,S]) → cross_k_0, cross_v_0, cross_k_1, … [B,K,S,D]
      prefill(tokens int64 [B,N], positions int64 [B,N], last int64 [B], mask float32 [B,N], [source_mask, cross_k_0, …])
                                                                                        → logits [B,V] at `last`, new_k_0, new_v_0, … [B,K,N,D]
      decode (tokens int64 [B,N], positions int64 [B,N], mask float32 [B,N,T+N], [window_mask float32 [B,N,W+N]],
              [source_mask, cross_k_0, cross_v_0, …], self_k_0, self_v_0, …)            → logits [B,N,V], new_k_0, new_v_0, … [B,K,N,D]

  What stands in brackets is there only where the layout has it. `prefill` is causal within its tokens; its `mask` marks padding.
  Caches are inputs only: a call gives the new keys and values, and the runtime writes them where it wants (a slot, a ring, a tree's
  branch, a quantized cache), so that nothing is copied but the new tokens. The last N columns of `mask` are the call's own tokens.
- With `cache_bits` 8 in the card every cache input is int8, and two scales float32 [B,K,time] stand behind each pair: `self_k_0, self_v_0,
  self_k_scale_0, self_v_scale_0, self_k_1, …`, and so for `cross_…`. Programs still give float32; the runtime rounds (see `caches.codes`).
- Layers with a window have caches of W slots, used as a ring; `window_mask` is theirs. In the decoder-decoder layout the layers from
  `shared_from` on all read one cache, the last pair.
- Encoder-only: `encode(source, source_mask) → logits [B,S,V]`.
"""
