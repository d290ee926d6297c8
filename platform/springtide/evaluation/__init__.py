"""Full-catalogue metrics, counting baselines and the report."""
