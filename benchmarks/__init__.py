"""Measurements of fastflow beside what its users would otherwise write.

    python -m benchmarks.gpu            kernels checked and measured on a GPU, one JSON file in results/
    python -m benchmarks.cpu            the table of a CPU, every goal beside what was measured, and its figure
    python -m pytest benchmarks         the same cases under pytest-benchmark, on whatever machine this is

`cases` names the shapes and counts their FLOPs and bytes, `rivals` holds the ways to compute them, `measure` the clock,
`machine` what a result needs to know about where it was made, `limited` what becomes of tests that no time is left for.
For the CPU: `cpu_rows` lists the table, `cpu_row` measures one of it, `cpu_report` and `cpu_figure` are its files,
`floq_update` and `td2_update` the whole updates, and what begins with `jax_` needs jax. `curves` draws what the
figures of a CPU and a GPU share.
"""
