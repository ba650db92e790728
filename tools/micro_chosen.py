"""The subjects: pictures that all six base styles have and that a stranger can name.

Left out are people, flags, lettering, clock times, arrows and other signs, and of several pictures that can
hardly be told apart (a dog and its face, six kinds of train) all but one. What the demo teaches or is
measured by is in, although a style lacks some of it.
"""

from __future__ import annotations

_NAMES = """
grinning face, grinning face with big eyes, grinning face with sweat, face with tears of joy, winking face,
smiling face with smiling eyes, smiling face with halo, smiling face with heart eyes, face blowing a kiss,
face savoring food, face with tongue, neutral face, smirking face, unamused face, grimacing face,
sleeping face, face with medical mask, cowboy hat face, smiling face with sunglasses, nerd face,
face with open mouth, flushed face, crying face, loudly crying face, face screaming in fear,
face with steam from nose, pouting face, angry face, smiling face with horns, skull, pile of poo, ogre,
goblin, ghost, alien, robot, see no evil monkey, love letter, red heart, blue heart, collision,
sweat droplets, bomb, monkey face, dog face, wolf, fox, cat face, tiger face, leopard, horse face, unicorn,
cow face, pig face, pig nose, ram, goat, camel, elephant, mouse face, hamster, rabbit face, chipmunk, bear,
koala, panda, paw prints, rooster, baby chick, penguin, dove, frog, crocodile, turtle, snake, dragon face,
spouting whale, dolphin, tropical fish, octopus, snail, butterfly, honeybee, lady beetle, spider,
spider web, bouquet, cherry blossom, rose, sunflower, tulip, seedling, evergreen tree, palm tree, cactus,
four leaf clover, maple leaf, grapes, watermelon, lemon, banana, pineapple, red apple, pear, peach,
cherries, strawberry, tomato, avocado, eggplant, carrot, ear of corn, hot pepper, mushroom, bread,
meat on bone, poultry leg, hamburger, french fries, pizza, bento box, rice ball, cooked rice, spaghetti,
sushi, fried shrimp, ice cream, doughnut, cookie, birthday cake, shortcake, cupcake, chocolate bar, candy,
lollipop, honey pot, baby bottle, hot beverage, wine glass, cocktail glass, tropical drink, beer mug,
fork and knife, kitchen knife, globe showing europe africa, snow capped mountain, volcano,
beach with umbrella, desert island, house with garden, school, factory, castle, tokyo tower,
statue of liberty, church, fountain, tent, carousel horse, ferris wheel, roller coaster, barber pole,
locomotive, bus, ambulance, fire engine, police car, taxi, automobile, delivery truck, tractor, racing car,
motorcycle, bicycle, bus stop, fuel pump, police car light, horizontal traffic light,
vertical traffic light, construction, anchor, sailboat, speedboat, ship, airplane, helicopter,
aerial tramway, rocket, hourglass not done, watch, alarm clock, full moon, crescent moon, thermometer, sun,
glowing star, cloud, sun behind cloud, cloud with rain, cloud with snow, cloud with lightning, tornado,
rainbow, umbrella, high voltage, snowflake, snowman, fire, jack o lantern, christmas tree, fireworks,
sparkler, balloon, party popper, ribbon, wrapped gift, ticket, military medal, trophy, soccer ball,
baseball, basketball, american football, tennis, bowling, fishing pole, running shirt, skis, direct hit,
pool 8 ball, crystal ball, video game, slot machine, game die, performing arts, framed picture,
artist palette, glasses, sunglasses, necktie, t shirt, jeans, dress, bikini, handbag, backpack, man s shoe,
high heeled shoe, woman s boot, crown, top hat, graduation cap, lipstick, ring, gem stone, postal horn,
bell, studio microphone, control knobs, microphone, headphone, radio, saxophone, guitar, musical keyboard,
trumpet, violin, mobile phone, telephone receiver, fax machine, battery, electric plug, laptop,
desktop computer, computer mouse, floppy disk, movie camera, film projector, clapper board, television,
camera, magnifying glass tilted left, candle, light bulb, flashlight, red paper lantern, closed book,
open book, books, scroll, rolled up newspaper, money bag, dollar banknote, money with wings, credit card,
envelope, package, pencil, fountain pen, paintbrush, briefcase, calendar, chart increasing,
chart decreasing, bar chart, pushpin, paperclip, straight ruler, scissors, wastebasket, locked, unlocked,
key, hammer, dagger, pistol, wrench, nut and bolt, microscope, telescope, satellite antenna, syringe, pill,
door, toilet, shower, bathtub, cigarette
"""

SUBJECTS = frozenset(name.strip() for name in _NAMES.replace("\n", " ").split(","))
"""Unicode's (CLDR) names, without signs, in lower case."""
