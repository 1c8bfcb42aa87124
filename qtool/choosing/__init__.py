"""Who gets how many bits: plan, costs and a budget in, a plan out."""
