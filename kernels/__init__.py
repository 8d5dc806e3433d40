"""Kernels of fastflow, installed as `fastflow.kernels`: torch and triton only, nothing of the rest of the package.

`integrate` walks, `matching` is the loss, `backward` the way back of both; each holds its kernel, then the launcher
that allocates and launches. All three evaluate the network by the device functions of `network`, or of `narrow` where
it fits a program; both stand on those of `tile` and `noise`. `group` walks few rows by several programs, `ring` many
rows on Hopper where it is asked for. `fold`, `pack` and `prepare` bring weights and inputs into the kernels' form, with
`first_layer` for what of it does not depend on the state and `encode` for the MLPs that time and cond go through;
`unfold` takes gradients back. `backup` makes a flow critic's targets. `plan` chooses designs and tiles, `roofline`
predicts what they take, `launch` tells where a launch runs; none of the three needs triton. `aot` compiles everything
without a GPU. `cpu` is the native code of the CPU, which needs no triton.

Letters: B batch, E ensemble, S noise samples, C cond, D flow state, F state features, T time features, H hidden, L
hidden layers, K steps, V evaluations per step, M = B S rows of one member. A trailing P is the size padded for tiles
(HP, FP, TP, DP, MP): padding holds zeros. Names: pointers `x_ptr`, addresses `p_x`, tiles `b_x`, offsets `o_b`, rows of
workspaces `r_m`, masks `m_b`, program ids `i_b`, constexpr in capitals; BM x BN is the tile.

The LayerNorm in front of a Dense layer is folded into it where it can be. With y the activations, mu and
r = rsqrt(var + eps) per row:

    LN(y) W + b = r (y W'') + b',    W'' = (I - 11^T/H) diag(scale) W,    b' = b + shift W

so that the un-normalised y can be stored at once and the statistics become one factor per row.
"""
