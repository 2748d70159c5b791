"""The places that Ray Train's groups have in a cluster: Ray's placement groups."""


def ours() -> dict[str, str]:
    """State by name (hexadecimal) of those that this driver's job has asked for: PENDING, CREATED, REMOVED, ..."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # a name ends with its job's
    return {name: one["state"] for name, one in placement_group_table().items() if name.endswith(job)}
