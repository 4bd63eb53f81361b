"""A small SmolLM on the text of Python's own library: the pretraining step of `make demo`.

    smoljax pretrain demo data.sources=shards/train

Expected: the loss falls from ln(4096) = 8.32 to about 4 within two minutes on 2 CPU cores (3.65 on held-out text).
"""

from smoljax.config import Data, Model, Optim, Train

config = Train(
    model=Model(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=128,
    ),
    steps=400,
    data=Data(sources={"shards/train": 1.0}, seq_len=128, batch_size=16),  # 2,048 tokens a step, 0.8 M in all
    optim=Optim(lr=5e-3, warmup_steps=25, decay_steps=100),
    init_std=0.06,
    save_every=100,
    log_every=5,
)
