"""The subjects: pictures that all six base styles have and that a stranger can name.

Left out are people, flags, lettering, clock times, arrows and other signs, and of several pictures that can
hardly be told apart (a dog and its face) all but one. What the demo teaches or is measured by is in, although
a style lacks some of it. There are no more than some hours of two cores can teach.
"""

from __future__ import annotations

_NAMES = """
grinning face, face with tears of joy, winking face, smiling face with halo, smiling face with heart eyes,
sleeping face, cowboy hat face, smiling face with sunglasses, nerd face, crying face, pouting face, skull,
pile of poo, ghost, alien, robot, red heart, blue heart, bomb, monkey face, dog face, fox, cat face, tiger
face, horse face, unicorn, cow face, pig face, camel, elephant, mouse face, rabbit face, bear, koala, panda,
rooster, baby chick, penguin, frog, crocodile, turtle, snake, dragon face, spouting whale, dolphin, tropical
fish, octopus, snail, butterfly, honeybee, lady beetle, spider, cherry blossom, rose, sunflower, tulip,
evergreen tree, palm tree, cactus, four leaf clover, grapes, watermelon, lemon, banana, pineapple, red
apple, pear, peach, cherries, strawberry, tomato, avocado, eggplant, carrot, ear of corn, hot pepper,
mushroom, bread, hamburger, french fries, pizza, sushi, ice cream, doughnut, cookie, birthday cake, cupcake,
chocolate bar, candy, lollipop, hot beverage, wine glass, cocktail glass, beer mug, volcano, house with
garden, castle, tent, bus, fire engine, police car, automobile, tractor, bicycle, anchor, sailboat,
airplane, helicopter, rocket, hourglass not done, watch, alarm clock, full moon, crescent moon, sun, glowing
star, cloud, rainbow, umbrella, high voltage, snowflake, snowman, fire, jack o lantern, christmas tree,
balloon, wrapped gift, trophy, soccer ball, basketball, american football, direct hit, t shirt, dress,
handbag, backpack, high heeled shoe, crown, top hat, ring, gem stone, bell, headphone, radio, guitar,
trumpet, violin, mobile phone, battery, television, camera, candle, light bulb, flashlight, closed book,
money bag, envelope, pencil, scissors, locked, key, hammer, microscope
"""

SUBJECTS = frozenset(name.strip() for name in _NAMES.replace("\n", " ").split(","))
"""Unicode's (CLDR) names, without signs, in lower case."""
