"""The knowledge behind the demo rows: `TOPICS`, and the names of those held out for the test split.

One block a topic, fields separated by " / " or a line end, in this order: name, pronoun, what its
items are, five items, five facts (kind, place, feature, known for, one more), a question whose
answer is yes with its answer, a question whose answer is no with its answer. A fact is a verb and
a phrase with "|" between: joined they are a predicate, the phrase alone is a JSON value.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """What is known about one thing; every text lacks its capital letter and its full stop."""

    name: str
    pronoun: str
    items_label: str
    items: list[str]
    facts: list[str]
    yes: tuple[str, str]
    no: tuple[str, str]


_TABLE = """
penguins / they / animals penguins eat / krill / squid / herring / anchovies / sardines
are|flightless seabirds with strong flippers / live along|cold coasts of the Southern Hemisphere
have|dense feathers that keep out water / are known for|their waddling walk and smart colours
catch|fish and krill in the sea
Do penguins lay eggs? / penguins lay one or two eggs and keep them warm
Can penguins fly? / penguins use their stiff wings to swim instead of flying

elephants / they / foods elephants eat / grass / leaves / bark / fruit / roots
are|the largest land animals on Earth / live in|the grasslands and forests of Africa and Asia
have|thick skin and wide flat feet / are known for|their long trunks and curved tusks
spend|most of the day eating plants
Can elephants swim? / elephants swim well and use the trunk as a snorkel
Do elephants eat meat? / elephants eat only plants such as grass and bark

owls / they / animals owls hunt / mice / voles / frogs / beetles / shrews
are|birds of prey that hunt at night / live in|woods and barns all over the world
have|large eyes and soft quiet feathers / are known for|turning their heads very far around
find|small animals by sound in the dark
Can owls hunt in the dark? / owls hunt in the dark with sharp hearing and large eyes
Can owls move their eyeballs? / owls have fixed eyes and must turn the whole head

honeybees / they / flowers honeybees visit / clover / lavender / thyme / heather / borage
are|flying insects that live in colonies / build|wax combs in hollow trees and hives
have|two pairs of wings and a hairy body / are known for|making honey and pollinating crops
dance|to show each other where food is
Do honeybees have a queen? / each honeybee colony has one queen that lays the eggs
Do all honeybees sting? / male honeybees have no sting at all

octopuses / they / animals octopuses eat / crabs / clams / shrimp / snails / mussels
are|soft sea animals with eight arms / live in|rocky dens on the ocean floor
have|three hearts and blue blood / are known for|changing colour to hide from danger
squeeze|through very small gaps in the rock
Do octopuses have three hearts? / octopuses have three hearts that pump blue blood
Do octopuses have bones? / octopuses have soft bodies without any bones

kangaroos / they / foods kangaroos eat / grass / leaves / shoots / herbs / flowers
are|large marsupials with strong back legs / live in|the open plains and woods of Australia
have|a heavy tail that helps them balance / are known for|hopping fast over long distances
carry|their young in a pouch
Do kangaroos carry their young in a pouch? / a kangaroo mother carries her joey in a pouch
Do kangaroos eat meat? / kangaroos graze on grass and other plants

camels / they / foods camels eat / grass / thorns / dates / grain / shrubs
are|tall desert animals with one or two humps / live in|the dry lands of Asia and Africa
have|long lashes that keep out sand / are known for|going many days without water
store|fat in their humps for hard times
Can camels close their nostrils? / camels close their nostrils to keep out blowing sand
Do camels store water in their humps? / camels store fat in their humps and not water

dolphins / they / animals dolphins eat / herring / squid / cod / shrimp / mackerel
are|clever sea mammals that breathe air / live in|warm seas and a few large rivers
have|smooth skin and a curved fin / are known for|their playful jumps and clear whistles
travel|in friendly groups called pods
Do dolphins breathe air? / dolphins come to the surface to breathe air
Are dolphins fish? / dolphins are mammals that feed their young with milk

tortoises / they / foods tortoises eat / grass / clover / dandelions / cacti / fruit
are|slow reptiles with a hard shell / live in|dry grasslands and warm deserts
have|short thick legs and no teeth / are known for|living longer than most other animals
pull|their heads inside when they feel danger
Do tortoises lay eggs? / tortoises dig a hole and lay their eggs in it
Can tortoises leave their shells? / a tortoise shell is part of the skeleton

bats / they / foods bats eat / moths / beetles / nectar / figs / mosquitoes
are|the only mammals that truly fly / sleep in|caves and old roofs during the day
have|thin wings stretched over long fingers / are known for|finding their way by echoes
hang|upside down when they rest
Do bats sleep upside down? / bats sleep upside down and hold on with their feet
Are bats blind? / bats can see and some of them see very well

pianos / they / parts of a piano / keys / pedals / strings / lid / soundboard
are|large keyboard instruments with many strings / stand in|homes and schools and concert halls
have|black and white keys in a long row / are known for|their wide range of soft and loud notes
need|tuning about once or twice a year
Do pianos have strings? / pianos have long metal strings that sound when keys are pressed
Is the piano a wind instrument? / the piano makes its sound with strings and not with air

guitars / they / parts of a guitar / neck / frets / strings / bridge / body
are|string instruments played with the fingers / appear in|folk bands and rock bands everywhere
have|a long neck and usually six strings / are known for|their warm chords and easy rhythms
come in|acoustic and electric forms
Do most guitars have six strings? / most guitars have six strings tuned from low to high
Do all guitars need electricity? / acoustic guitars sound loud enough without electricity

drums / they / kinds of drum / snare drum / bass drum / bongo / conga / tabla
are|percussion instruments that players strike / appear in|parades and bands on every continent
have|a tight skin over a hollow frame / are known for|giving music a strong and steady beat
rank among|the oldest instruments of all
Can drums be played by hand? / many drums such as bongos are played with bare hands
Do drums have strings to pluck? / drums sound when someone strikes the tight skin

flutes / they / other woodwind instruments / piccolo / recorder / clarinet / oboe / bassoon
are|wind instruments shaped like a thin tube / appear in|orchestras and marching bands
have|holes and keys that change the note / are known for|their bright and airy sound
are made of|silver or wood or bamboo
Are flutes wind instruments? / flutes make sound when air blows across a hole
Do modern flutes need a reed? / flutes sound without a reed because air meets an edge

trumpets / they / brass instruments like the trumpet / cornet / bugle / trombone / tuba / horn
are|brass instruments with a bright voice / appear in|jazz clubs and army bands
have|three valves and a wide bell / are known for|their loud and ringing notes
sound|when the player buzzes the lips
Are trumpets made of brass? / most trumpets are made of brass tubing with a wide bell
Do trumpets have strings? / trumpets make sound with air and the player's lips

violins / they / parts of a violin / scroll / pegs / strings / bridge / chin rest
are|small wooden string instruments / appear in|orchestras and folk groups
have|four strings and a curved body / are known for|their sweet and singing tone
rest|under the chin of the player
Do violins have four strings? / violins have four strings tuned in fifths
Do violins have frets? / violins have a smooth fingerboard without frets

rice / it / dishes made with rice / sushi / risotto / paella / pilaf / congee
is|the seed of a tall water-loving grass / grows in|flooded fields called paddies in Asia
has|a mild taste and a soft texture / is known for|feeding more than half of the world
cooks|in hot water in about twenty minutes
Is rice a grain? / rice is a grain that comes from a kind of grass
Does rice grow on trees? / rice grows on a grass planted in wet fields

cheese / it / kinds of cheese / cheddar / brie / gouda / feta / parmesan
is|a solid food made from milk / ages in|cool cellars and dairy rooms
has|plenty of protein and calcium / is known for|its many shapes and strong smells
comes from|the milk of cows or goats or sheep
Is cheese made from milk? / cheese is made from milk that has been curdled
Does all cheese have holes? / cheeses such as cheddar and feta have no holes

bananas / they / foods made with bananas / smoothies / pancakes / muffins / milkshakes / fritters
are|soft sweet fruits with a yellow peel / grow in|hot and rainy lands near the equator
have|plenty of potassium and natural sugar / are known for|their curved shape and easy peel
ripen|well after they have been picked
Do bananas turn brown as they ripen? / bananas grow brown spots as they become riper
Do bananas grow on true trees? / bananas grow on giant herbs without any wood

potatoes / they / dishes made with potatoes / chips / mash / gnocchi / rosti / hash browns
are|starchy tubers that grow underground / come from|the high Andes of South America
have|thin skin and pale firm flesh / are known for|filling meals at a low price
keep|for months in a dark cool place
Do potatoes grow underground? / potatoes grow underground as swollen stems called tubers
Should people eat green potatoes? / green potatoes can hold a poison called solanine

tomatoes / they / dishes made with tomatoes / ketchup / salsa / gazpacho / bruschetta / shakshuka
are|juicy red fruits used as vegetables / grow in|sunny gardens and heated glasshouses
have|many small seeds and a thin skin / are known for|their rich taste in soups and sauces
come from|western South America
Are tomatoes fruits? / tomatoes are fruits because they hold the seeds of the plant
Are all tomatoes red? / ripe tomatoes may also be yellow or orange or purple

lemons / they / foods flavoured with lemon / lemonade / sorbet / curd / sherbet / marmalade
are|sour citrus fruits with yellow skin / grow on|evergreen trees in warm sunny lands
have|plenty of vitamins and sharp juice / are known for|their fresh smell and sour taste
help|cooks to brighten fish and salads
Are lemons citrus fruits? / lemons are citrus fruits like oranges and limes
Do lemon trees like hard frost? / lemon trees are easily harmed by hard frost

olive oil / it / foods served with olive oil / salads / pasta / hummus / fish / pizza
is|a golden fat pressed from olives / comes from|groves around the Mediterranean Sea
has|a fruity smell and a peppery taste / is known for|its place in healthy cooking
keeps|best in a dark and cool cupboard
Does olive oil float on water? / olive oil floats because it is lighter than water
Does olive oil mix with water? / olive oil forms a separate layer on top of water

chocolate / it / kinds of chocolate / dark / milk / white / ruby / drinking
is|a sweet food made from cocoa beans / comes from|cacao trees in the tropics
has|a smooth feel because of cocoa butter / is known for|melting gently in the mouth
makes|a popular gift in many countries
Is chocolate made from cocoa beans? / chocolate is made from roasted and ground cocoa beans
Is chocolate safe for dogs? / chocolate contains theobromine and that can poison dogs

hammers / they / kinds of hammer / claw hammer / mallet / sledgehammer / gavel / ball-peen
are|hand tools with a heavy head / hang in|workshops and garages everywhere
have|a long handle that adds force / are known for|driving nails into wood
pull out|bent nails with a split claw
Can a claw hammer pull out nails? / a claw hammer pulls out nails with its split end
Do hammers need batteries? / hammers work by the swing of the arm alone

ladders / they / kinds of ladder / step / rope / loft / roof / extension
are|climbing tools with rungs between two rails / stand in|garages and barns and building sites
have|rubber feet that stop them sliding / are known for|helping people reach high places
are made of|wood or aluminium or fibreglass
Can ladders be made of wood? / many ladders are made of wood with strong round rungs
Is it safe to stand a ladder on ice? / a ladder may slip on ice and throw its user off

scissors / they / things people cut with scissors / paper / cloth / hair / string / tape
are|cutting tools with two crossing blades / lie in|kitchens and offices and sewing boxes
have|two loops for the thumb and fingers / are known for|cutting paper and cloth neatly
turn|on a small screw in the middle
Do scissors have two blades? / scissors have two blades that slide past each other
Are all scissors made for right hands? / some scissors are made for people who use the left hand

screwdrivers / they / kinds of screwdriver / flathead / Phillips / Torx / hex / Robertson
are|hand tools that turn screws / lie in|tool boxes at home and at work
have|a hard steel shaft and a thick grip / are known for|fixing furniture and small machines
come with|flat or cross-shaped tips
Can a screwdriver loosen screws? / a screwdriver loosens most screws when turned to the left
Does one screwdriver fit every screw? / screwdrivers need a tip that matches the screw

saws / they / kinds of saw / handsaw / hacksaw / chainsaw / jigsaw / fretsaw
are|cutting tools with a toothed blade / hang in|workshops and garden sheds
have|rows of sharp teeth along one edge / are known for|cutting planks and branches to length
cut|with short and steady strokes
Can some saws cut metal? / a hacksaw cuts metal with its fine hard teeth
Do all saws need a motor? / handsaws cut wood with the strength of the arm

compasses / they / people who use compasses / hikers / sailors / pilots / scouts / explorers
are|tools that show which way is north / travel in|the packs of hikers and sailors
have|a magnetic needle that turns freely / are known for|guiding ships over open sea
work|without a battery or a signal
Do compasses use magnetism? / a compass needle lines up with the magnetic field of Earth
Do magnetic compasses need batteries? / magnetic compasses work by the field of Earth alone

Mercury / it / planets other than Mercury / Venus / Earth / Mars / Jupiter / Neptune
is|the smallest planet around the Sun / orbits in|the zone closest to the Sun
has|a grey surface full of craters / is known for|its very hot days and icy nights
takes|only eighty-eight days to circle the Sun
Is Mercury smaller than Earth? / Mercury is far smaller than Earth
Does Mercury have moons? / Mercury travels around the Sun without any moon

Venus / it / planets other than Venus / Mercury / Earth / Mars / Jupiter / Uranus
is|a rocky planet almost as large as Earth / orbits in|the gap between Mercury and Earth
has|thick clouds of acid / is known for|being the hottest planet of all
turns|slowly and in the opposite direction
Is Venus hotter than Mercury? / Venus is hotter because its thick air traps heat
Does Venus have moons? / Venus circles the Sun alone without any moon

Mars / it / features seen on Mars / craters / canyons / volcanoes / dunes / ice caps
is|a small rocky planet with thin air / orbits in|the lane just outside that of Earth
has|two tiny moons and a giant volcano / is known for|its red and rusty soil
takes|nearly two years to circle the Sun
Does Mars have moons? / Mars has two tiny moons called Phobos and Deimos
Have people walked on Mars? / only robots have landed on Mars so far

Jupiter / it / moons of Jupiter / Io / Europa / Ganymede / Callisto / Amalthea
is|the largest planet around the Sun / orbits in|the cold region beyond Mars
has|dozens of moons and faint rings / is known for|its bands and Great Red Spot
spins|around once in about ten hours
Is Jupiter larger than Earth? / Jupiter is so large that Earth would fit inside it many times
Can a spacecraft land on solid ground on Jupiter? / Jupiter is a ball of gas without solid ground

Saturn / it / moons of Saturn / Titan / Rhea / Mimas / Dione / Enceladus
is|a giant planet made mostly of gas / orbits in|the cold space beyond Jupiter
has|many moons and a pale golden colour / is known for|its wide and bright rings
takes|about twenty-nine years to circle the Sun
Does Saturn have rings? / Saturn has wide rings made of ice and rock
Is Saturn the largest planet? / Saturn comes second in size after Jupiter

Neptune / it / moons of Neptune / Triton / Nereid / Proteus / Galatea / Larissa
is|a blue giant planet made of ice and gas / orbits in|the far edge of the planet family
has|five main rings that are thin and dark / is known for|the fastest winds of any planet
takes|about 165 years to circle the Sun
Is Neptune colder than Earth? / Neptune is far colder because sunlight there is weak
Can people see Neptune without a telescope? / Neptune is too faint for the naked eye

oak trees / they / things made from oak wood / barrels / tables / floors / beams / doors
are|large trees that can live for centuries / grow in|the mild woods of the northern world
have|lobed leaves and deep roots / are known for|their acorns and strong timber
feed|jays and squirrels every autumn
Do oak trees grow from acorns? / every wild oak tree begins as a small acorn
Do oak trees have needles? / oak trees have broad leaves and no needles

bamboo / it / things made from bamboo / flutes / mats / baskets / chopsticks / fences
is|a giant grass with hollow stems / grows in|warm and damp parts of Asia
has|hard joints along its green stems / is known for|growing very fast
feeds|giant pandas in the hills of China
Is bamboo a grass? / bamboo is a grass even though its stems look like wood
Is bamboo slow to grow? / bamboo ranks among the fastest growing plants on Earth

cacti / they / animals that eat cacti / tortoises / packrats / iguanas / peccaries / camels
are|thick desert plants full of water / grow in|the dry lands of North and South America
have|sharp spines in place of leaves / are known for|surviving months without rain
open|bright flowers for a short time
Do cacti have flowers? / cacti open bright flowers that draw bees and bats
Do cacti need rain every day? / cacti store water and can wait months for rain

roses / they / colours of roses / red / pink / white / yellow / orange
are|thorny shrubs with scented flowers / grow in|gardens and hedges around the world
have|soft petals and prickly stems / are known for|standing for love and friendship
bloom|from early summer until autumn
Do roses have a scent? / many roses have a sweet scent that is used in perfume
Are all roses red? / roses may also be white or pink or yellow

ferns / they / kinds of fern / bracken / maidenhair / staghorn / bird's nest / sword fern
are|green plants that never make flowers / grow in|damp and shady woods
have|feathery leaves called fronds / are known for|the curled tips of young leaves
spread|by tiny spores under their leaves
Do ferns make spores? / ferns make tiny spores on the underside of their leaves
Do ferns have flowers? / ferns spread by spores and never make flowers

sunflowers / they / foods made with sunflower seeds / oil / granola / crackers / pesto / trail mix
are|tall plants with large yellow heads / grow in|sunny fields and gardens
have|rough leaves and thick hairy stems / are known for|turning to face the morning sun
give|seeds that birds and people enjoy
Do sunflowers need sunlight? / sunflowers need plenty of sunlight to grow tall
Do sunflowers grow well in deep shade? / sunflowers stay weak in deep shade

castles / they / parts of a castle / moat / tower / gate / keep / dungeon
are|strong stone homes built for defence / stand on|hills and river banks across Europe
have|thick walls and narrow windows / are known for|their towers and deep moats
sheltered|lords and soldiers in times of war
Did some castles have moats? / many castles had moats to keep attackers away
Were castle walls usually thin? / castle walls were often several metres thick

bridges / they / kinds of bridge / arch bridge / beam bridge / drawbridge / rope bridge / footbridge
are|structures that carry people over gaps / stand over|rivers and valleys and busy roads
have|strong supports that bear the load / are known for|joining places that were far apart
are made of|stone or steel or concrete
Can bridges be made of steel? / many long bridges are made of steel cables and beams
Do bridges only cross water? / bridges also cross valleys and roads and railways

windmills / they / parts of a windmill / sails / cap / tower / gears / millstones
are|tall machines driven by moving air / stand on|flat and breezy land such as Holland
have|four or more long turning sails / are known for|grinding grain and pumping water
turn|to face the wind for more power
Did windmills grind grain? / many windmills ground grain between heavy stones
Do windmills burn coal? / windmills take all their power from the wind

greenhouses / they / plants grown in greenhouses / tomatoes / peppers / cucumbers / orchids / melons
are|glass houses where plants grow / stand in|gardens and farms in cool countries
have|clear walls that let in light / are known for|growing summer crops in winter
stay|warm because they trap the heat
Do greenhouses trap heat? / greenhouses trap heat under a roof of glass or plastic
Are greenhouse walls usually dark? / greenhouse walls are clear so that light can enter

igloos / they / tools for an igloo builder / snow knife / saw / shovel / gloves / lamp
are|round shelters built from snow / stand in|the far north of Canada and Greenland
have|curved walls that hold without poles / are known for|staying warm in bitter cold
serve|hunters on long winter trips
Are igloos built from snow? / igloos are built from blocks of hard packed snow
Are igloos colder inside than outside? / igloos hold body heat and stay warmer than the air outside

lighthouses / they / parts of a lighthouse / lamp / lens / gallery / tower / foghorn
are|tall towers with a strong lamp / stand on|rocky coasts and harbour walls
have|large lenses that bend the light / are known for|warning ships about danger
flash|in a pattern that sailors know
Do lighthouses help sailors? / lighthouses help sailors to stay away from rocks
Do all lighthouses have keepers today? / most lighthouses run by machine without a keeper

soccer / it / soccer positions / goalkeeper / defender / midfielder / winger / striker
is|a team game played with the feet / takes place on|grass pitches all over the world
has|two teams of eleven players / is known for|the World Cup every four years
lasts|ninety minutes with a short break
Is soccer played by two teams? / soccer is played by two teams of eleven players
Can soccer midfielders throw the ball during play? / soccer midfielders use the feet or head

basketball / it / basketball skills / dribbling / passing / shooting / blocking / jumping
is|a fast team game with a bouncing ball / takes place on|hard courts indoors and outdoors
has|two high hoops and five players a side / is known for|its dunks and long shots
began|as a winter game in Massachusetts
Do basketball players dribble the ball? / basketball players dribble the ball to move with it
Can basketball players kick the ball on purpose? / basketball players must use their hands

golf / it / things a golfer uses / driver / putter / iron / wedge / tee
is|a calm game of hitting a small ball / takes place on|wide green courses with sand traps
has|eighteen holes on a full course / is known for|its quiet crowds and long walks
rewards|the player who takes the fewest strokes
Does golf use clubs? / golf players hit the ball with several kinds of club
Does the highest score win in golf? / golf is won by the player with the fewest strokes

tennis / it / tennis strokes / serve / forehand / backhand / volley / lob
is|a racket game for two or four players / takes place on|grass or clay or hard courts
has|a net across the middle of the court / is known for|its fast serves and long rallies
counts|points as fifteen and thirty and forty
Can tennis be played by four people? / tennis is played by four people in a doubles match
Is tennis played without a net? / tennis needs a low net across the middle of the court

swimming / it / swimming strokes / crawl / backstroke / butterfly / breaststroke / sidestroke
is|a sport that works the whole body / takes place in|pools and lakes and the sea
has|races over short and long distances / is known for|being gentle on the joints
builds|strong lungs and a healthy heart
Is swimming an Olympic sport? / swimming has been part of every modern Olympic Games
Is swimming hard on the joints? / swimming is gentle because water carries the body
"""

HELD_OUT = frozenset(
    {
        "penguins",
        "violins",
        "chocolate",
        "hammers",
        "Saturn",
        "sunflowers",
        "lighthouses",
        "tennis",
    }
)


def _topic(block: str) -> Topic:
    name, pronoun, label, *rest = block.strip().replace("\n", " / ").split(" / ")
    yes, no = (rest[10], rest[11]), (rest[12], rest[13])
    return Topic(name, pronoun, label, rest[:5], rest[5:10], yes, no)


TOPICS = [_topic(block) for block in _TABLE.strip().split("\n\n")]
