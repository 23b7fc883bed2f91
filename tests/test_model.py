"""model.py: LLaMA and LLaVA equal transformers and the recorded original; packing mixes nothing."""

from types import SimpleNamespace

import pytest
import torch

from kernels import elementwise
from kernels.attention import Packing, attend_to_cache, attention
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Cache, Llama, LlamaConfig, Llava, LlavaConfig
from vision import ClipVisionConfig

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128)


def pack(sequences, pixel_values=None, labels=None):
    """Lists of ids -> a packed batch; by default every second token is learned."""
    ids = torch.tensor([i for s in sequences for i in s])
    position = torch.tensor([p for s in sequences for p in range(len(s))])
    if labels is None:
        labels = torch.where((position % 2 == 1) & (ids >= 0), ids, IGNORE_INDEX)
    lengths = torch.tensor([0] + [len(s) for s in sequences])
    pixels = torch.empty(0, 3, 28, 28) if pixel_values is None else pixel_values
    return SimpleNamespace(input_ids=ids, labels=labels, position_ids=position, cu_seqlens=lengths.cumsum(0),
                           pixel_values=pixels, image_sizes=[(28, 28)] * len(pixels),
                           ids=[str(i) for i in range(len(sequences))])


def small_llava(**changes):
    torch.manual_seed(0)
    vision = ClipVisionConfig(24, 48, 3, 4, 3, 28, 7)
    return Llava(LlavaConfig(LlamaConfig(**SMALL, num_key_value_heads=2), vision, "mlp2x_gelu", **changes))


def words(count, seed=0):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PICTURE = [IMAGE_TOKEN_INDEX] * 16

# ------------------------------------------------------------------------------------------------- against the peers

VARIANTS = {
    "multi_head": {}, "grouped": {"num_key_value_heads": 2}, "one_kv_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True}, "eps_and_theta": {"rms_norm_eps": 1e-3, "rope_theta": 500.0},
    "wide_heads": {"head_dim": 16},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 32}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_equals_transformers(variant):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **VARIANTS[variant])).eval()
    config = LlamaConfig.from_dict(theirs.config.to_dict())
    ours = Llava(LlavaConfig(config))
    ours.language_model.load_state_dict(theirs.state_dict())
    sequences = [words(40), words(7, 1)]
    with torch.no_grad():
        logits = ours.logits(pack(sequences))
        expected = torch.cat([theirs(torch.tensor([s])).logits[0] for s in sequences])
    assert (logits - expected).abs().max() < 5e-5


def test_mistral_equals_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)
    theirs = transformers.MistralForCausalLM(config).eval()
    ours = Llava(LlavaConfig(LlamaConfig.from_dict(theirs.config.to_dict())))
    ours.language_model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert (ours.logits(pack([words(30)])) - theirs(torch.tensor([words(30)])).logits[0]).abs().max() < 5e-5


def test_configs_that_are_not_llama_are_refused():
    for values, sentence in (({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
                             ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
                             ({"sliding_window": 64, "max_position_embeddings": 4096}, "sliding window")):
        with pytest.raises(ValueError, match=sentence):
            LlamaConfig.from_dict(SMALL | values)


def test_parameter_counts_of_the_published_models():
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
    assert sum(p.numel() for p in llama.parameters()) == 6_738_415_616


def test_gold_forward(gold):
    """Logits, loss and gradients of the recorded batch of mixed conversations: text, one picture, two, a later turn."""
    import json

    from safetensors.torch import load_file

    from weights import load
    loaded = load(gold / "ckpt/lm_mha", dtype="float32", vision_tower=gold / "ckpt/vision",
                  pretrain_mm_mlp_adapter=gold / "ckpt/projector_mlp2x.bin")
    model, recorded = loaded.model, load_file(gold / "forward/lm_mha.safetensors")
    lengths = recorded["attention_mask"].sum(1).tolist()
    sequences, labels = [], []
    rows = zip(recorded["input_ids"], recorded["attention_mask_in"].bool(), lengths, recorded["labels"])
    for row, padded, mask, spliced in rows:
        ids = [j for i in row[padded].tolist() for j in ([i] * 16 if i == IMAGE_TOKEN_INDEX else [i])]
        assert len(ids) == mask
        sequences.append(ids)
        labels += spliced[: len(ids)].tolist()
    batch = pack(sequences, recorded["images"][[0, 2, 3, 4]], torch.tensor(labels))  # picture 1 is the text sample's
    model.vision_tower.requires_grad_(False)
    logits = model.logits(batch).detach()
    place = recorded["attention_mask"].bool()
    assert (logits[:, ::128] - recorded["logits_stride128"][place]).abs().max() < 5e-5
    assert (logits.logsumexp(-1) - recorded["logsumexp"][place]).abs().max() < 5e-5
    loss = model.loss(batch)
    loss.backward()
    meta = json.loads((gold / "forward/meta.json").read_text())["lm_mha"]
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-6)
    for name, p in model.named_parameters():
        theirs = "model." + name if name.startswith("mm_projector") else name.removeprefix("language_model.")
        if p.requires_grad:
            assert p.grad.double().norm().item() == pytest.approx(meta["grad_l2"][theirs], rel=1e-5), name
        if "grad." + theirs in recorded:
            expected = recorded["grad." + theirs]
            assert (p.grad - expected).abs().max() < 2e-5 * expected.abs().max(), name


# -------------------------------------------------------------------------------------------------- packed attention


def dense(q, k, v, causal):
    """One sequence by the book, in float64. (L, H, K)"""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("qhk,thk->hqt", q.double(), k) / q.shape[2] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
    return torch.einsum("hqt,thk->qhk", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [7, 7, 7], [9, 4, 6], [90, 2, 1, 3], [401], [701]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_the_formula(lengths, kv_heads, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator).to(dtype) for heads in (4, kv_heads, kv_heads))
    for causal in (True, False) if len(set(lengths)) == 1 else (True,):
        out = attention(q, k, v, Packing(torch.tensor([0, *lengths]).cumsum(0)), causal)
        expected = torch.cat([dense(*x, causal) for x in zip(*(t.split(lengths) for t in (q, k, v)))])
        assert (out.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("lengths", [[9, 4, 6], [90, 2, 1, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gradients(lengths, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(sum(lengths), h, 8, generator=generator).to(dtype).requires_grad_() for h in (4, 2, 2))
    weight = torch.randn(sum(lengths), 4, 8, generator=generator)
    (attention(q, k, v, Packing(torch.tensor([0, *lengths]).cumsum(0)), True).float() * weight).sum().backward()
    ours = [x.grad.double() for x in (q, k, v)]
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = torch.cat([dense(*x, True) for x in zip(*(t.split(lengths) for t in (q, k, v)))])
    (out * weight).sum().backward()
    for mine, x in zip(ours, (q, k, v)):
        assert (mine - x.grad).abs().max() < (1e-5 if dtype == torch.float32 else 6e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_attention_in_blocks_where_no_gradient_is_wanted(length, causal):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2 * length, heads, 16, generator=generator).bfloat16() for heads in (6, 2, 2))
    with torch.no_grad():
        out = attention(q, k, v, Packing.equal(2, length, "cpu"), causal)
    for rows in (slice(0, length), slice(length, None)):
        expected = dense(*(x[rows].double() for x in (q, k, v)), causal)
        assert (out[rows] - expected).abs().max() < 2e-2


def test_attention_without_a_mask_wants_equal_lengths():
    x = torch.zeros(5, 1, 4)
    with pytest.raises(ValueError, match="equal length"):
        attention(x, x, x, Packing(torch.tensor([0, 2, 5])), causal=False)


def test_attend_to_cache_looks_at_each_row_s_own_past():
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 20, 2, 8, generator=generator)
    starts, lengths = torch.tensor([3, 12, 12, 12, 6]), torch.tensor([3, 4, 5, 6, 1])  # one row, three of one sequence
    q = torch.randn(5, 4, 8, generator=generator)
    out = attend_to_cache(q, keys, values, starts, lengths)
    for i, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist())):
        last = torch.zeros(n, 4, 8)
        last[-1] = q[i]
        assert (out[i] - dense(last, keys[start: start + n], values[start: start + n], True)[-1]).abs().max() < 2e-6
    alone = [attend_to_cache(q[at], keys, values, starts[at], lengths[at]) for at in ([0], [1, 2, 3], [4])]
    assert torch.equal(torch.cat(alone), out)


@pytest.mark.parametrize("heads", [6, 2])
def test_many_sequences_that_decode_in_bfloat16_share_two_products(heads):
    """As near to the exact answer as each alone; cells that nobody has written hold anything."""
    generator = torch.Generator().manual_seed(1)
    starts, lengths = torch.arange(6) * 20 + 3, torch.tensor([9, 10, 6, 17, 8, 14])
    keys, values = torch.randn(2, 130, 2, 8, generator=generator).bfloat16()
    written = torch.cat([torch.arange(start, start + n) for start, n in zip(starts.tolist(), lengths.tolist())])
    for cells in (keys, values):
        cells[~torch.isin(torch.arange(130), written)] = float("nan")
    q = torch.randn(6, heads, 8, generator=generator).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = attend_to_cache(q, keys, values, starts, lengths)
    assert sum(event.key == "aten::bmm" and event.count for event in profile.key_averages()) == 2
    alone = torch.cat([attend_to_cache(q[i: i + 1], keys, values, starts[i: i + 1], lengths[i: i + 1])
                       for i in range(6)])
    exact = attend_to_cache(q.float(), keys.float(), values.float(), starts, lengths)
    assert (out - exact).abs().max() < 2**-6 and (alone - exact).abs().max() < 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, 1])
def test_what_is_shorter_without_a_gradient_says_the_same(dtype, rows):
    """Bit for bit: norm, SwiGLU and rotation; but one row is divided by its length as a number of Python."""
    x, weight, cos = (torch.randn(shape).to(dtype) for shape in ((rows, 24), (24,), (rows, 1, 8)))
    q, k = torch.randn(rows, 4, 8).to(dtype), torch.randn(rows, 2, 8).to(dtype)
    found = []
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            found.append([elementwise.rms_norm(x, weight, 1e-5), elementwise.swiglu(x, x.flip(0)),
                          *elementwise.rotate(q, k, cos, cos)])
    if rows == 1:
        first, second = found[0].pop(0), found[1].pop(0)
        assert (first - second).abs().max() <= torch.finfo(dtype).eps * second.abs().max()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@torch.no_grad()
def test_the_norm_of_odd_rows(dtype, rows):
    """None, zeros without and with an eps, infinity."""
    x, weight = torch.zeros(rows, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    assert elementwise.rms_norm(x, weight, 0.0).isnan().all() and elementwise.rms_norm(x, weight, 1e-6).eq(0).all()
    x[:, 3] = float("inf")
    y = elementwise.rms_norm(x, weight, 1e-6)
    assert y.shape == x.shape and y.dtype == dtype and y[:, 3].isnan().all() and y[:, :3].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_change_in_one_sequence_changes_no_other(dtype):
    model = small_llava().to(dtype)
    first, second, third = words(9), words(5, 1) + PICTURE + words(4, 2), words(60, 3)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    before = model.logits(pack([first, second, third], pixels))
    after = model.logits(pack([[7] * 9, second, third], pixels))
    assert torch.equal(before[9:], after[9:]) and not torch.equal(before[:9], after[:9])
    after = model.logits(pack([first, second, third], pixels + 1))
    assert torch.equal(before[:14], after[:14]) and torch.equal(before[34:], after[34:])
    assert not torch.equal(before[14:34], after[14:34])


# -------------------------------------------------------------------------------------------------------------- LLaVA


@torch.no_grad()
def test_mixed_batches_equal_one_by_one():
    """Text only, one picture, two pictures, a picture in a later place: together as alone."""
    model = small_llava()
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    sequences = [words(9), words(3, 1) + PICTURE + words(8, 2), PICTURE + words(2, 3) + PICTURE + words(3, 4),
                 words(20, 5) + PICTURE + words(2, 6)]
    pictures = [pixels[:0], pixels[:1], pixels[1:3], pixels[3:]]
    together = model.logits(pack(sequences, pixels))
    alone = torch.cat([model.logits(pack([s], p)) for s, p in zip(sequences, pictures)])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("feature, tokens", [("patch", 16), ("cls_patch", 17)])
def test_image_tokens(feature, tokens):
    model = small_llava(mm_vision_select_feature=feature)
    assert model.config.image_tokens == tokens
    assert model.view_features(torch.zeros(2, 3, 28, 28)).shape == (2, tokens, 32)


def test_loss_is_the_mean_over_labelled_rows():
    model = small_llava()
    batch = pack([words(9), words(3, 1) + PICTURE + words(8, 2)], torch.randn(1, 3, 28, 28))
    logits, expected = model.logits(batch), []
    for t in (batch.labels != IGNORE_INDEX).nonzero().flatten().tolist():
        expected.append(-logits[t - 1].log_softmax(-1)[batch.labels[t]])
    assert model.loss(batch).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_a_batch_without_pictures_still_gives_the_projector_a_zero_gradient():
    model = small_llava()
    model.loss(pack([words(9)])).backward()
    for p in model.mm_projector.parameters():
        assert p.grad is not None and p.grad.abs().max() == 0


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        model = small_llava()
        model.language_model.model.gradient_checkpointing = on
        model.loss(pack([words(9), PICTURE + words(8, 2)], torch.ones(1, 3, 28, 28))).backward()
        grads.append([p.grad for p in model.language_model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_cache_continues_what_it_holds():
    """Token by token, several at a time, in stretches that must grow and move."""
    model = small_llava()
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    sequences = [words(9), PICTURE + words(8, 2), words(1, 3)]
    cache = Cache(model.config.text, torch.float32, "cpu", 12)
    stretches = [cache.open(size) for size in (9, 30, 1)]
    logits = model.last_logits(pack(sequences, pixels), cache, stretches)
    for more in (1, 1, 4, 1, 7):
        expected = model.logits(batch := pack(sequences, pixels))[batch.cu_seqlens[1:] - 1]
        assert (logits - expected).abs().max() < 1e-5
        newest = [words(more, i) for i in range(3)]
        sequences = [s + new for s, new in zip(sequences, newest)]
        batch = pack(newest)
        batch.position_ids = torch.cat([torch.arange(s.length, s.length + more) for s in stretches])
        logits = model.last_logits(batch, cache, stretches)
    assert [s.length for s in stretches] == [len(s) for s in sequences]


@torch.no_grad()
def test_cache_holds_sequences_side_by_side():
    cache = Cache(LlamaConfig(**SMALL), torch.float32, "cpu")
    a, b, c = (cache.open(size) for size in (10, 5, 20))
    assert (a.start, b.start, c.start) == (0, 10, 15) and len(cache.keys[0]) == 40  # doubled
    cache.close(b)
    assert cache.open(5).start == 10 and cache.open(6).start == 35  # where b was; behind the others
    for x in (*cache.keys, *cache.values):
        x[:10] = torch.randn(10, *x.shape[1:])
    a.length = 10
    held = [x[:10].clone() for x in (*cache.keys, *cache.values)]
    twin = cache.copy(a)
    cache.fit(a, 11)  # moves, with what it holds
    assert a.size == 20 and twin.length == a.length == 10
    for x, numbers in zip((*cache.keys, *cache.values), held):
        assert torch.equal(x[a.start: a.start + 10], numbers) and torch.equal(x[twin.start: twin.start + 10], numbers)
    places = sorted((s.start, s.size) for s in cache.stretches)
    assert all(start + size <= after for (start, size), (after, _) in zip(places, places[1:]))


@torch.no_grad()
def test_sequences_move_together_before_the_cache_grows():
    cache = Cache(LlamaConfig(**SMALL), torch.float32, "cpu", 40)
    a, b, c = (cache.open(size) for size in (10, 6, 20))
    c.length = 18
    for x in (*cache.keys, *cache.values):
        x.normal_()
    held = [x[16:34].clone() for x in (*cache.keys, *cache.values)]
    cache.close(b)
    assert cache.open(10).start == 30 and (a.start, c.start) == (0, 10) and len(cache.keys[0]) == 40
    assert all(torch.equal(x[10:28], numbers) for x, numbers in zip((*cache.keys, *cache.values), held))
    assert cache.open(1).start == 40 and len(cache.keys[0]) == 80


def test_a_blind_model_says_so():
    blind = Llava(LlavaConfig(LlamaConfig(**SMALL)))
    with pytest.raises(ValueError, match="no vision tower"):
        blind.logits(pack([PICTURE + words(3)]))
