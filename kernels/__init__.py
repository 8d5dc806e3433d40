"""Triton kernels of fastflow, installed as `fastflow.kernels`: torch and triton only, nothing of the rest of the
package.

A kernel file contains, in this order: the kernels, then the launcher that allocates, packs and launches. `plan`
chooses tiles and
needs no triton; `tile` holds device functions; `fold` packs weights and turns gradients of packed weights back.

Letters: B batch, E ensemble, S noise samples, C cond, D flow state, F features of the first layer, H hidden, L hidden
layers,
K steps, M = B S rows of one member. A trailing P is the size padded for tiles (HP, FP, DP, CP, MP): padding holds
zeros.
Names: pointers `x_ptr`, tiles `b_x`, offsets `o_b`, masks `m_b`, program ids `i_b`, constexpr in capitals; BM x BN is
the tile.

The LayerNorm in front of a Dense layer is folded into it. With y the activations, mu and r = rsqrt(var + eps) per row:

    LN(y) W + b = r (y W'') + b',    W'' = (I - 11^T/H) diag(scale) W,    b' = b + shift W

so that the un-normalised y can be stored at once and the statistics become one factor per row.
"""
