"""Looking at a model: what it costs, how fast it runs, what its tokens attend to."""

from tokenlearner.inspection.cost import Cost, LayerCost, cost
from tokenlearner.inspection.speed import Speed, measure_speed

__all__ = ["Cost", "LayerCost", "Speed", "cost", "measure_speed"]
