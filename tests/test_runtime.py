"""The compilation cache is on where nobody said otherwise."""

import jax

from smoljax import runtime


def test_the_cache_is_on_by_default_and_where_the_user_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        runtime.start()
        assert jax.config.jax_compilation_cache_dir == before[0]  # the suite's, from the environment
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        runtime.start()
        found = jax.config.jax_compilation_cache_dir
        assert found == str(tmp_path / "smoljax" / "jax" / runtime.processor())
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
