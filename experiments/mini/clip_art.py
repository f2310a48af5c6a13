"""Make the miniature's clip art: thumbnails of drawings whose name says a word that the student knows.

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb DIR
    python experiments/mini/clip_art.py DIR          # writes curation_env/mini/assets/clip_art.npz
    python experiments/mini/clip_art.py DIR --out X  # the same bytes elsewhere

The drawings were picked by name and looked at one by one: one thing each, easy to tell at 32 pixels. Scaling is exact
integer arithmetic (`render.area_weights`) and the archive is stored as it is, so the file does not depend on the
versions of Pillow, numpy and zlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from curation_env.mini import render
from curation_env.mini.language import CATEGORY

FOLDER = Path("usr", "share", "openclipart", "png")
FRUIT, MAMMALS, BIRDS, MUSIC = "food/fruit", "animals/mammals", "animals/birds", "recreation/music"
VEHICLES, ASTRONOMY = "transportation/vehicles", "geography/astronomy"
# Drawings by word, without ".png". Architetto Francesco Rollandini's have Italian names: cavallo, horse; vacca, cow.
PICKS: dict[str, list[str]] = {
    "apple": [
        "food/apple_bitten_dan_gerhard_01", f"{FRUIT}/an_apple_01", f"{FRUIT}/another_apple_01", f"{FRUIT}/apple",
        f"{FRUIT}/apple_bw", f"{FRUIT}/apple_martin_schmidt-li_01r", f"{FRUIT}/cartoon_apple_k_yager_01",
    ],
    "banana": [f"{FRUIT}/banana", f"{FRUIT}/bananas_nicu_buculei_01"],
    "pear": [
        f"{FRUIT}/green_pear_01", f"{FRUIT}/pear", f"{FRUIT}/pear_01", f"{FRUIT}/pear_02", f"{FRUIT}/pear_simple",
        f"{FRUIT}/pear_simple_bw", f"{FRUIT}/pera_architetto_francesc_01",
    ],
    "grape": [f"{FRUIT}/grape_01", f"{FRUIT}/grapes_01", f"{FRUIT}/grapes_simple", f"{FRUIT}/grapes_simple_bw"],
    "lemon": [f"{FRUIT}/lemon", f"{FRUIT}/lemon_simple", f"{FRUIT}/lemon_simple_bw", f"{FRUIT}/lemon_whole_ganson"],
    "peach": [f"{FRUIT}/peach_simple", f"{FRUIT}/pesca_architetto_frances_01"],
    "plum": [f"{FRUIT}/la_prugna_architetto_fra_01", f"{FRUIT}/prune"],
    "cherry": [f"{FRUIT}/cherries", f"{FRUIT}/cherry_jean_victor_balin_", f"{FRUIT}/cherry_jonathan_dietrich_01"],
    "dog": [
        f"{MAMMALS}/dog_01_drawn_with_strai_01", f"{MAMMALS}/dog_03_drawn_with_strai_01",
        f"{MAMMALS}/dog_04_drawn_with_strai_01", f"{MAMMALS}/dog_05_drawn_with_strai_01",
        f"{MAMMALS}/dog_06_drawn_with_strai_01", f"{MAMMALS}/dog_on_leash_gerald_g._01", f"{MAMMALS}/dogs/bored_dog_01",
        f"{MAMMALS}/dogs/dog_head_nicu_buculei_01", f"{MAMMALS}/dogs/dog_head_nicu_buculei_02",
        f"{MAMMALS}/dogs/beagle_copper_ganson", f"{MAMMALS}/dogs/black_lab_ganson",
        f"{MAMMALS}/dogs/bobi_architetto_francesc_01", f"{MAMMALS}/dogs/bulldog_puppy_ganson",
    ],
    "cat": [
        f"{MAMMALS}/cartoon_cat_gerald_g._01", f"{MAMMALS}/housecats/gatto_cat_architetto_fra_01",
        f"{MAMMALS}/housecats/gatto_cat_architetto_fra_02", f"{MAMMALS}/housecats/gatto_cat_architetto_fra_03",
        f"{MAMMALS}/housecats/gatto_cat_architetto_fra_04", f"{MAMMALS}/housecats/kitten_gerald_g._01",
    ],
    "horse": [f"{MAMMALS}/horses/cavallo_architetto_franc_0{k}" for k in range(1, 8)],
    "cow": [f"{MAMMALS}/vacca_pezzata_rossa_val_01"],
    "sheep": [f"{MAMMALS}/dall_sheep_ram_ganson", f"{MAMMALS}/pecora_architetto_france_01", f"{MAMMALS}/sheep-md-v0.1"],
    "goat": [f"{MAMMALS}/goat_nicu_buculei_01"],
    "lion": [f"{MAMMALS}/big_cats/leone_01_architetto_fran_01", f"{MAMMALS}/big_cats/leone_02_architetto_fran_01"],
    "bear": [
        *(f"{MAMMALS}/bears/orso_architetto_francesc_0{k}" for k in (1, 3, 4)),
        f"{MAMMALS}/bears/ours_etienne_bersac_r",
    ],
    "crow": [f"{BIRDS}/crow_01"],
    "duck": [f"{BIRDS}/duck_yellow_kurt_cagle_", f"{BIRDS}/jonathon_s_duck_01"],
    "eagle": [
        f"{BIRDS}/acquila_architetto_franc_02", f"{BIRDS}/acquila_architetto_franc_03",
        f"{BIRDS}/aquila_frontale_architet_01", f"{BIRDS}/eagle_01",
    ],
    "owl": [f"{BIRDS}/gufo_civetta_architetto__01", f"{BIRDS}/owl_on_branch_ganson"],
    "swan": [f"{BIRDS}/cigno_architetto_frances_01", f"{BIRDS}/cigno_di_spalle_architet_01"],
    "hen": [f"{BIRDS}/hen_01"],
    "hammer": [
        "tools/blacksmith_hammer_ganson", "tools/construction_hammer_jon__01", "tools/hammer_nicu_buculei_01",
        "tools/hammer_peterm1",
    ],
    "saw": ["tools/saw_peterm_", "tools/utensile_sega_architetto_01"],
    "drill": ["tools/drill_peterm_"],
    "rake": ["tools/leafrake_benji_park_01"],
    "axe": ["tools/axe_peterm_"],
    "car": [
        "transportation/car_jamin_ellis_", "transportation/formula_one_car_gerald_g_01",
        "transportation/old_car_lumen_design_st_r", "transportation/skoda_car_alejandro_teja_",
        "transportation/sportcar_sergio_luiz_ara_01", f"{VEHICLES}/car",
    ],
    "bus": [
        "signs_and_symbols/map_symbols/aiga_bus_", "transportation/bus1_bw_jarno_vasamaa_01",
        "transportation/bus1_jarno_vasamaa_01", "transportation/bus2_bw_jarno_vasamaa_01",
        "transportation/bus2_jarno_vasamaa_01", "transportation/roadsigns/bus_symbol_black_01",
    ],
    "train": ["recreation/toys/kiddy_train_orlando_kara_"],
    "truck": [
        "transportation/big_truck_01", "transportation/small_truck_steffen_gluc_01",
        "transportation/truck_jarno_vasamaa1", "transportation/truck_jarno_vasamaa_",
    ],
    "boat": [
        "transportation/boating/boat_jarno_vasamaa1", "transportation/boating/boat_jarno_vasamaa_",
        "transportation/boating/sailboat_illustration",
    ],
    "plane": [
        *(f"{VEHICLES}/aircraft_jarno_vasamaa{k}" for k in ("_", 1, 2, 3, 4)), f"{VEHICLES}/military_airplane_mo_01",
        f"{VEHICLES}/plane_silhouet_mo_01",
    ],
    "bike": [
        "transportation/bicycle_philippe_colin_01", "transportation/bike_tobias_jakobs_", f"{VEHICLES}/bicycle_01",
        f"{VEHICLES}/vtt_02",
    ],
    "tram": ["transportation/tramway_lumen_design_stu_01"],
    "mars": [f"{ASTRONOMY}/mars_dan_gerhards_01"],
    "venus": ["science/astronomy/venus_dan_gerhards_01"],
    "earth": ["geography/earth_globe_dan_gerhrads_01", "geography/planet_earth_dan_gerhard_01"],
    "saturn": [f"{ASTRONOMY}/saturn_dan_gerhards_01"],
    "jupiter": [f"{ASTRONOMY}/jupiter_dan_gerhards_01"],
    "violin": [f"{MUSIC}/violin_colour_ganson", f"{MUSIC}/violin_ganson"],
    "flute": [f"{MUSIC}/flute_ganson"],
    "drum": [f"{MUSIC}/africandrum_benji_park{k}" for k in ("_", 1, 2)],
    "harp": [f"{MUSIC}/harp1_ganson", f"{MUSIC}/harp2_ganson", f"{MUSIC}/harp3_ganson", f"{MUSIC}/harp_mo_01"],
    "guitar": [
        f"{MUSIC}/bass_guitar_a.j._ashton_", f"{MUSIC}/electric_guitar_andrea__01r", f"{MUSIC}/guitar_ganson",
        f"{MUSIC}/guitar_jarno_vasamaa1", f"{MUSIC}/guitar_jarno_vasamaa2", f"{MUSIC}/guitar_profile_philippe__01",
    ],
    "trumpet": [
        f"{MUSIC}/trumpet_b_flat_colour_ganso", f"{MUSIC}/trumpet_pocket__ganson",
        f"{MUSIC}/trumpet_pocket_colour_ganso",
    ],
    "cello": [f"{MUSIC}/cello_ganson", f"{MUSIC}/cello_mo_01"],
}  # fmt: skip


def thumbnail(path: Path) -> np.ndarray:
    """The drawing in the middle of a square of SIDE pixels: red, green, blue times opacity, and opacity; uint8."""
    with Image.open(path) as image:
        drawing = image.convert("RGBA")
    whole = np.asarray(drawing.crop(drawing.getchannel("A").getbbox()), np.int64)
    height, width = whole.shape[:2]
    longest = max(height, width)
    size = [max(1, (2 * render.SIDE * n + longest) // (2 * longest)) for n in (height, width)]
    opacity = whole[..., 3:]
    covered = np.concatenate([whole[..., :3] * opacity, opacity * 255], axis=2)
    scaled = render.resample(covered, size[0], size[1], 255)
    square = np.zeros((render.SIDE, render.SIDE, 4), np.uint8)
    top, left = (render.SIDE - size[0]) // 2, (render.SIDE - size[1]) // 2
    square[top : top + size[0], left : left + size[1]] = scaled
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder that the Debian package openclipart-png was unpacked to")
    shipped = Path(render.__file__).parent / "assets" / "clip_art.npz"
    parser.add_argument("--out", type=Path, default=shipped)
    args = parser.parse_args()
    if unknown := PICKS.keys() - CATEGORY.keys():
        parser.error(f"words that the student doesn't know: {', '.join(sorted(unknown))}")
    pairs = [(word, args.package / FOLDER / f"{name}.png") for word, names in PICKS.items() for name in names]
    if missing := [str(path) for _, path in pairs if not path.is_file()]:
        parser.error("not in the package: " + ", ".join(missing))
    with args.out.open("wb") as file:
        np.savez(file, images=np.stack([thumbnail(path) for _, path in pairs]), words=np.array([w for w, _ in pairs]))
    print(f"{len(pairs)} thumbnails of {len(PICKS)} words, {args.out.stat().st_size:,} bytes: {args.out}")


if __name__ == "__main__":
    main()
