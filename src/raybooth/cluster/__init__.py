"""The only place with Ray. It wraps plain callables and adds no meaning."""
