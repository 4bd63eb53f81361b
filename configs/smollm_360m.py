"""SmolLM-360M: 629B tokens, the same data, batch and schedule as SmolLM-135M.

    smoljax pretrain smollm-360m

Published (nanotron configuration and model card): every number below but the ones marked as ours. The base model then
has, zero-shot: HellaSwag 51.8, ARC 50.1, PIQA 71.6, MMLU cloze 34.4, WinoGrande 52.8, OpenBookQA 37.2, TriviaQA 9.1.
Hardware: the card says 64 H100, the configuration 32 replicas. A loss curve was not published.
One stage, and its mixture is published.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Optim, Train

config = Train(
    model=replace(SIZES["smollm-360m"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=600_000,  # x 1,048,576 tokens = 629B
    data=Data(
        sources={
            "shards/fineweb-edu-dedup": 0.70,
            "shards/cosmopedia-v2": 0.15,
            "shards/python-edu": 0.08,
            "shards/open-web-math": 0.06,
            "shards/stackoverflow": 0.01,
        },
        seq_len=2048,
        batch_size=512,  # rows: 32 replicas x 8 rows x 2 micro-batches; x 2,048 = 1,048,576 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        seed=42,
    ),
    optim=Optim(
        lr=3e-3,
        warmup_steps=5000,
        decay_steps=100_000,  # from step 500,000: the last 16.7%
        decay="1-sqrt",
        min_lr=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        weight_decay_on="all",  # nanotron's list of exceptions was empty: norms and the embedding decay too
        clip=1.0,
    ),
    init_std=0.03227486121839514,  # 1/sqrt(960)
    seed=8,
    save_every=2000,
    keep_every=100_000,  # ours; the start of the decay is among them
    # Ours: memory, not mathematics. 8 micro-batches are 64 rows each, the published 8 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 64 / N.
    accumulate=8,
    compute=Compute(dtype="bfloat16"),
)
