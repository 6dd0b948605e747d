"""The recipes: `python -m train.teacher`, `train.stage1`, `train.stage2`, and `train.demo` for all of them."""
