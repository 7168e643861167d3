"""Kinds of attention. One contract, one file per kind; `dense` is the reference that the others are tested against.

A kind is a class built as `Kind(head_dim)` with

    forward(q_BSHE, k_BSKE, v_BSKE, angles, documents) -> out_BSHE    a whole batch, each slot sees its document's past
    prefill(q, k, v, angles, documents, capacity) -> (out, state)     the same, and a state to decode from
    step(q_B1HE, k_B1KE, v_B1KE, angles, length_B, state) -> out      one more slot; sample b already holds length_B[b]

Queries and keys arrive normalised but not rotated: a kind rotates them itself (a quantiser must see them before).
"""

from model.attention.dense import DenseAttention

KINDS = {"dense": DenseAttention}
