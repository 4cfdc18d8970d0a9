"""Which policies around a snapshot are measured. One file per design; `design.py` says what a design is."""

from rlvr_landscape_plugin.designs.design import Design, Designer, Point, Surroundings, find_designer

DESIGNS = {
    "grid": "rlvr_landscape_plugin.designs.grid.grid_designs",
    "census": "rlvr_landscape_plugin.designs.census.census_designs",
    "path": "rlvr_landscape_plugin.designs.path.path_designs",
    "boundary": "rlvr_landscape_plugin.designs.boundary.boundary_designs",
}
"""Name in a configuration → import path of the designer."""

__all__ = ["DESIGNS", "Design", "Designer", "Point", "Surroundings", "find_designer"]
