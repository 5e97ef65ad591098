"""HeteroFL on WikiText-2: a masked language model (Transformer) in sub-models by width, 100 clients with a row each.

Commands (``source`` is a file with the streams of token ids train and test):
  hetfl train --config=configs/heterofl_wikitext2.py                     a1-b1-c1-d1-e1, the paper's settings
  hetfl train --config=configs/heterofl_wikitext2.py:mix=a1-e1
  hetfl train --config=configs/heterofl_wikitext2.py:small               a smaller net and 50 steps a round
  hetfl train --config=configs/heterofl_wikitext2.py:method=inclusivefl,small
                                            InclusiveFL: Transformers of 4, 3 and 2 equal layers, one model a depth
Published (figures of the paper, best round, interpolation): perplexity a 3.37, a-e 3.3 to 6.0. The loss counts every
position, hidden or not, which is why perplexities are so low.
Device and time: the paper's settings want an accelerator; small takes minutes on one CPU core, see
experiments/wikitext2.
"""

from hetfl_jax.run.config import changed, parse_arg, shrink


def get_config(arg=""):
    arg = parse_arg(arg, method="heterofl", mix="", source="text:wikitext2.npz", small=False, quick=False)
    if arg.method not in ("heterofl", "inclusivefl"):
        raise ValueError(f"method {arg.method!r} is not one of heterofl, inclusivefl (heterofl_wikitext2.py)")
    width = arg.method == "heterofl"
    mix = arg.mix or ("a1-b1-c1-d1-e1" if width else "4x1-3x1-2x1")
    args = dict(assignment="dynamic", mask=True) if width else dict(beta=0.2, timing="previous")
    config = changed(
        data=dict(
            source=arg.source,
            split="natural",
            concentration=0.6,
            test_fraction=0.0,
            augment="corrupt:0.15",
            options=dict(length=64, rows=100, test_rows=10, test_tokens=0),
        ),
        family=dict(
            net="transformer",
            hidden=(512, 512, 512, 512),
            embedding=256,
            heads=8,
            length=64,
            dropout=0.2,
            mix=mix,
            exits=False,
            norm="ln",
            scaler=width,
        ),
        method=dict(name=arg.method, args=dict(cohort=10, **args)),
        train=dict(
            rounds=200,
            batch_size=1,
            momentum=0.9,
            weight_decay=5e-4,
            clip_norm=1.0,
            milestones=(50, 100),
        ),
        run=dict(
            name=f"{arg.method}_wikitext2_{mix}{'_small' if arg.small else ''}",
            eval_every=5,
            eval_batch_size=10,
            statistics_batch_size=10,
            checkpoint_every=5,
        ),
    )
    if arg.small:
        config.family.update(dict(hidden=(128, 128, 128, 128), embedding=64, heads=4))
        config.train.update(dict(rounds=30, steps=50, milestones=(20,)))
        config.data.options.test_tokens = 24_000
        config.run.eval_every = 10
    if not arg.quick:
        return config
    config.family.update(dict(embedding=16, heads=2, mix="a1-b1" if width else "2x1-1x1"))
    config.family.hidden, config.data.options.rows = config.family.hidden[:2], 10
    config.data.options.test_tokens = 2_000
    config = shrink(config)
    config.data.examples = 20
    return config
