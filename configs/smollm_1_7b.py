"""SmolLM-1.7B: 1.05T tokens in batches of 2.1M.

    smoljax pretrain smollm-1-7b

Published (nanotron configuration and model card): every number below but the ones marked as ours. The base model then
has, zero-shot: HellaSwag 62.9, ARC 59.9, PIQA 76.0, WinoGrande 54.7, OpenBookQA 42.4, TriviaQA 22.5; GSM8K (5-shot)
5.5. Hardware: the configuration has 64 replicas. A loss curve was not published.
The mixture changes on the way: Python-Edu for StarCoderData's Python, and a little of DeepMind's mathematics.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Optim, Stage, Train

config = Train(
    model=replace(SIZES["smollm-1.7b"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=500_000,  # x 2,097,152 tokens = 1.049T
    data=Data(
        sources={
            "shards/fineweb-edu-dedup": 0.70,
            "shards/cosmopedia-v2": 0.15,
            "shards/open-web-math": 0.06,
            "shards/starcoderdata-python": 0.08,
            "shards/stackoverflow": 0.01,
        },
        seq_len=2048,
        batch_size=1024,  # rows: 64 replicas x 4 rows x 4 micro-batches; x 2,048 = 2,097,152 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        seed=42,
    ),
    stages=(
        Stage(
            start=299_999,  # nanotron's 300,000: it counts iterations from 1, and a stage begins with the one it names
            sources={
                "shards/fineweb-edu-dedup": 0.70,
                "shards/cosmopedia-v2": 0.15,
                "shards/open-web-math": 0.055,
                "shards/python-edu": 0.08,
                "shards/stackoverflow": 0.01,
                "shards/deepmind_mathematics": 0.005,
            },
        ),
    ),
    optim=Optim(
        lr=5e-4,
        warmup_steps=2000,
        decay_steps=100_000,  # from step 400,000: the last 20%
        decay="1-sqrt",
        min_lr=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        weight_decay_on="all",  # nanotron's list of exceptions was empty: norms and the embedding decay too
        clip=1.0,
    ),
    init_std=0.022097086912079608,  # 1/sqrt(2048)
    seed=8,
    save_every=2000,
    keep_every=100_000,  # ours; the start of the decay, and one update after the change of mixture
    # Ours: memory, not mathematics. 32 micro-batches are 32 rows each, the published 4 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 256 / N. Weights, two moments and gradients are 16 B a parameter,
    # 27 GB: the default mesh splits them over all devices.
    accumulate=32,
    compute=Compute(dtype="bfloat16"),
)
