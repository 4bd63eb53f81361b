"""The demo's model at four times the context: 128 -> 512 positions, theta 10,000 -> 100,000.

    smoljax pretrain demo-long data.sources=shards/train init_from=runs/demo

Expected: beyond position 128, where the short model gets worse (3.98 at 256-511), this one does not (3.60).
"""

from smoljax.config import Data, Model, Optim, Train

config = Train(
    model=Model(  # configs/demo.py's, but for the last two lines
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=512,
        rope_theta=100_000.0,
    ),
    steps=40,
    data=Data(sources={"shards/train": 1.0}, seq_len=512, batch_size=8, seed=1),  # 4,096 tokens a step
    optim=Optim(lr=1e-3, warmup_steps=5, decay_steps=20),
    init_from="runs/demo",
    save_every=40,
    log_every=2,
)
