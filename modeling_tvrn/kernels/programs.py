"""The Triton programs, imported only where they run: see the package's docstring for what they compute and cost.

All tensors are contiguous. A program's M = CAPTIONS·WORDS rows are the words of a few captions, each padded to WORDS,
a power of two: sums over a caption's words are reductions of a reshaped tile. Rows and columns that pad a tile hold
zeros. Reductions, softmaxes and norms are in float32 as in the plain path, and tiles are rounded where that rounds.
"""

import triton
import triton.language as tl


@triton.jit
def attention(scores, in_caption, is_source, bias, scale, slope, CAPTIONS: tl.constexpr, WORDS: tl.constexpr):
    """Weights of the sources from affinities, both (M, N): leaky ReLU, each source's L2 norm over a caption's words,
    softmax over the sources, whose (N,) biases are added."""
    N: tl.constexpr = scores.shape[1]
    scores = tl.where(scores > 0, scores, scores * slope)
    scores = tl.where(in_caption[:, None], scores, 0.0)
    words = tl.reshape(scores, (CAPTIONS, WORDS, N))
    norm = tl.maximum(tl.sqrt(tl.sum(words * words, axis=1)), 1e-8)
    words = words / tl.reshape(norm, (CAPTIONS, 1, N))
    scores = tl.reshape(words, (CAPTIONS * WORDS, N)) * scale + bias[None, :]
    scores = tl.where(is_source[None, :], scores, -1e30)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def inverse_norm(weights, gram, floor, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """1/‖Σ w x‖ of every row of weights (M, N), from the COUNT × COUNT Gram matrix of the x."""
    n = tl.arange(0, weights.shape[1])
    there = (n < COUNT)[:, None] & (n < COUNT)[None, :]
    products = tl.load(gram + n[:, None] * COUNT + n[None, :], mask=there, other=0.0)
    squared = tl.sum(weights * tl.dot(weights, products, input_precision=PRECISION), axis=1)
    return 1.0 / tl.sqrt(tl.maximum(squared, floor))


@triton.jit
def refined_words(
    words,
    gates,
    values,
    alpha,
    rows,
    in_caption,
    d,
    D: tl.constexpr,
    REGIONS: tl.constexpr,
    REFINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile (M, columns d) of T̃ = t + σ(A t + α·gate) ∘ (α·carried), in the dtype of the words."""
    there = in_caption[:, None] & (d < D)[None, :]
    at = rows[:, None] * D + d[None, :]
    refined = tl.load(words + at, mask=there, other=0.0)
    if REFINED:
        n = tl.arange(0, alpha.shape[1])
        known = (n < REGIONS)[:, None] & (d < D)[None, :]
        source = values + n[:, None] * (2 * D) + d[None, :]
        gate = tl.load(gates + at, mask=there, other=0.0).to(tl.float32)
        gate += tl.dot(alpha, tl.load(source, mask=known, other=0.0), input_precision=PRECISION)
        carried = tl.dot(alpha, tl.load(source + D, mask=known, other=0.0), input_precision=PRECISION)
        refined = (refined.to(tl.float32) + tl.sigmoid(gate) * carried).to(refined.dtype)
    return refined


# What lies at odd addresses in a part of a gallery, and would compile the program again for every mixture of these.
UNALIGNED = ["word_mask", "word_weights", "context_gram", "region_mask"]
UNALIGNED += ["refined_gram", "refined_saliency", "refined_mask"]


@triton.jit(
    do_not_specialize=["own_captions", "images", "captions", "words_count", "score_row", "score_image"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def reasoning(
    words,  # (T, W, D)
    gates,  # (T, W, D)
    word_mask,  # (T, W)
    word_weights,  # (T, W) float32
    scores,  # queries · keys: (t·W, I, R), or (I, t·W, R) where each image has its own captions
    values,  # (I, R, 2D)
    context_gram,  # (I, R, R) float32
    region_mask,  # (I, R)
    refined_regions,  # (I, N, D)
    refined_gram,  # (I, N, N) float32
    refined_saliency,  # (I, N) float32
    refined_mask,  # (I, N)
    global_vector,  # (I, D)
    projection,  # (S, D)
    head,  # (2, S) float32: SAF's weights of the gate and of the vote
    gate_bias,  # (1,) float32
    overall,  # (I, t, D) out: Σ_j w_j T_j
    nodes,  # (I, t, 1 + W, S) out, from the second on: the words' similarity vectors; SAF has none
    weights,  # (I, t, 1 + W) float32 out, from the second on: ω; SAF: (I, t, 2), Σ ωβ (w·s) and Σ ωβ
    own_captions,  # 1 where each image has its own t captions, else 0
    images,  # I
    captions,  # t
    words_count,  # W
    score_row,  # the strides of `scores`
    score_image,
    scale,
    slope,
    floor,
    D: tl.constexpr,
    S: tl.constexpr,
    REGIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    REFINED: tl.constexpr,
    SALIENT: tl.constexpr,
    SAF: tl.constexpr,
    CAPTIONS: tl.constexpr,
    WORDS: tl.constexpr,
    N: tl.constexpr,  # ≥ REGIONS, TOKENS
    SIMILARITY: tl.constexpr,  # ≥ S
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One image with CAPTIONS captions.

    Captions are the fastest axis, so that programs beside each other read the same image.
    """
    groups = tl.cdiv(captions, CAPTIONS)
    first = tl.program_id(0) % groups * CAPTIONS
    image = tl.program_id(0) // groups
    M: tl.constexpr = CAPTIONS * WORDS
    row = tl.arange(0, M)
    caption = first + row // WORDS
    word = row % WORDS
    here = (caption < captions) & (word < words_count)
    rows = (own_captions * image * captions + caption) * words_count + word
    in_caption = here & (tl.load(word_mask + rows, mask=here, other=0) != 0)
    n = tl.arange(0, N)
    is_token = tl.load(refined_mask + image * TOKENS + n, mask=n < TOKENS, other=0) != 0
    values += image * REGIONS * 2 * D
    refined_regions += image * TOKENS * D
    global_vector += image * D

    # Where each word's expansion looks.
    alpha = tl.zeros((M, N), words.dtype.element_ty)
    if REFINED:
        is_region = tl.load(region_mask + image * REGIONS + n, mask=n < REGIONS, other=0) != 0
        column = caption * words_count + word
        looked = (column * score_row + image * score_image)[:, None] + n[None, :]
        affinity = tl.load(scores + looked, mask=here[:, None] & (n < REGIONS)[None, :], other=0.0).to(tl.float32)
        bias = tl.zeros((N,), tl.float32)
        looks = attention(affinity, in_caption, is_region, bias, scale, slope, CAPTIONS, WORDS)
        inverse = inverse_norm(looks, context_gram + image * REGIONS * REGIONS, floor, REGIONS, PRECISION)
        alpha = (looks * inverse[:, None]).to(words.dtype.element_ty)

    # First pass over D: what a word has in common with each region and with the whole image, and its norm.
    cosine = tl.zeros((M, N), tl.float32)
    common = tl.zeros((M,), tl.float32)
    squares = tl.zeros((M,), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        refined = refined_words(words, gates, values, alpha, rows, here, d, D, REGIONS, REFINED, PRECISION)
        known = (d < D)[:, None] & (n < TOKENS)[None, :]
        tokens = tl.load(refined_regions + n[None, :] * D + d[:, None], mask=known, other=0.0)
        cosine = tl.dot(refined, tokens, cosine, input_precision=PRECISION)
        wide = refined.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if SALIENT:
            whole = tl.load(global_vector + d, mask=d < D, other=0.0).to(tl.float32)
            common += tl.sum(wide * whole[None, :], axis=1)
    norm = tl.maximum(tl.sqrt(squares), 1e-8)

    # Where each word looks, and how salient it is.
    bias = tl.load(refined_saliency + image * TOKENS + n, mask=n < TOKENS, other=0.0)
    beta = attention(cosine / norm[:, None], in_caption, is_token, bias, scale, slope, CAPTIONS, WORDS)
    inverse = inverse_norm(beta, refined_gram + image * TOKENS * TOKENS, floor, TOKENS, PRECISION)
    beta = (beta * (inverse * norm)[:, None]).to(words.dtype.element_ty)
    salient = tl.where(in_caption, scale * common / norm, -1e30)
    salient = tl.reshape(salient, (CAPTIONS, WORDS))
    valid = tl.reshape(in_caption.to(tl.float32), (CAPTIONS, WORDS))
    salient = tl.exp(salient - tl.reshape(tl.max(salient, axis=1), (CAPTIONS, 1))) * valid
    total = tl.sum(salient, axis=1)
    mean = tl.sum(valid, axis=1) / tl.where(total > 0, total, 1.0)
    omega = tl.reshape(salient * tl.reshape(mean, (CAPTIONS, 1)), (M,))

    # Second pass: the captions' global vectors, and the words' similarity vectors.
    share = tl.load(word_weights + rows, mask=here, other=0.0).to(tl.float32) / norm
    similar = tl.arange(0, SIMILARITY)
    group = first + tl.arange(0, CAPTIONS)
    local = tl.zeros((M, SIMILARITY), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        refined = refined_words(words, gates, values, alpha, rows, here, d, D, REGIONS, REFINED, PRECISION)
        wide = refined.to(tl.float32)
        known = (n < TOKENS)[:, None] & (d < D)[None, :]
        tokens = tl.load(refined_regions + n[:, None] * D + d[None, :], mask=known, other=0.0)
        difference = tl.dot(beta, tokens, input_precision=PRECISION) - wide
        squared = (difference * difference).to(refined.dtype)
        known = (d < D)[:, None] & (similar < S)[None, :]
        mapping = tl.load(projection + similar[None, :] * D + d[:, None], mask=known, other=0.0)
        local = tl.dot(squared, mapping, local, input_precision=PRECISION)
        summed = tl.sum(tl.reshape(share[:, None] * wide, (CAPTIONS, WORDS, COLUMNS)), axis=1)
        exists = (group < captions)[:, None] & (d < D)[None, :]
        target = overall + (image * captions + group)[:, None] * D + d[None, :]
        tl.store(target, summed.to(overall.dtype.element_ty), mask=exists)

    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(local * local, axis=1)), 1e-8)
    if SAF:
        gating = tl.load(head + similar, mask=similar < S, other=0.0)
        voting = tl.load(head + S + similar, mask=similar < S, other=0.0)
        gated = tl.sum(local * gating[None, :], axis=1) * inverse + tl.load(gate_bias)
        mixing = omega * tl.sigmoid(gated)
        votes = mixing * tl.sum(local * voting[None, :], axis=1) * inverse
        pair = image * captions + group
        tl.store(weights + 2 * pair, tl.sum(tl.reshape(votes, (CAPTIONS, WORDS)), axis=1), mask=group < captions)
        tl.store(weights + 2 * pair + 1, tl.sum(tl.reshape(mixing, (CAPTIONS, WORDS)), axis=1), mask=group < captions)
    else:
        node = (image * captions + caption) * (1 + words_count) + 1 + word
        tl.store(weights + node, omega, mask=here)
        found = (local * inverse[:, None]).to(nodes.dtype.element_ty)
        there = here[:, None] & (similar < S)[None, :]
        tl.store(nodes + node[:, None] * S + similar[None, :], found, mask=there)


@triton.jit(
    do_not_specialize=["own_captions", "images", "captions", "words_count"],
    do_not_specialize_on_alignment=["word_weights", "region_mask"],
)
def late_interaction(
    words,  # (T, W, D)
    word_weights,  # (T, W) float32
    regions,  # (I, R, D)
    region_mask,  # (I, R)
    out,  # (I, t) float32
    own_captions,  # 1 where each image has its own t captions, else 0
    images,  # I
    captions,  # t
    words_count,  # W
    scale,
    D: tl.constexpr,
    REGIONS: tl.constexpr,
    CAPTIONS: tl.constexpr,
    WORDS: tl.constexpr,
    IMAGES: tl.constexpr,  # 1 where each image has its own captions
    N: tl.constexpr,  # ≥ REGIONS
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """IMAGES images with CAPTIONS captions."""
    M: tl.constexpr = CAPTIONS * WORDS
    first = tl.program_id(0) * CAPTIONS
    first_image = tl.program_id(1) * IMAGES
    row = tl.arange(0, M)
    caption = first + row // WORDS
    word = row % WORDS
    here = (caption < captions) & (word < words_count)
    rows = (own_captions * first_image * captions + caption) * words_count + word
    column = tl.arange(0, IMAGES * N)
    image = first_image + column // N
    region = column % N
    there = (image < images) & (region < REGIONS)
    sources = image * REGIONS + region
    cosine = tl.zeros((M, IMAGES * N), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        left = tl.load(words + rows[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        right = tl.load(regions + sources[None, :] * D + d[:, None], mask=(d < D)[:, None] & there[None, :], other=0.0)
        cosine = tl.dot(left, right, cosine, input_precision=PRECISION)
    valid = tl.load(region_mask + sources, mask=there, other=0) != 0
    soft = tl.reshape(tl.where(valid[None, :], cosine * scale, -1e30), (M, IMAGES, N))
    best = tl.max(soft, axis=2)
    total = tl.sum(tl.exp(soft - tl.reshape(best, (M, IMAGES, 1))), axis=2)
    count = tl.sum(tl.reshape(valid.to(tl.float32), (IMAGES, N)), axis=1)
    best = (best + tl.log(total) - tl.log(tl.maximum(count, 1.0))[None, :]) / scale
    share = tl.load(word_weights + rows, mask=here, other=0.0).to(tl.float32)
    summed = tl.sum(tl.reshape(best * share[:, None], (CAPTIONS, WORDS, IMAGES)), axis=1)
    group = first + tl.arange(0, CAPTIONS)
    i = first_image + tl.arange(0, IMAGES)
    kept = (group < captions)[:, None] & (i < images)[None, :]
    tl.store(out + i[None, :] * captions + group[:, None], summed, mask=kept)
