"""Openings in languages other than English: forms of user turns, and subjects for them.

A subject stands as a name, after a colon or after "topic", so that it needs no article and no case.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Language(NamedTuple):
    """How user turns begin in a language."""

    forms: tuple[str, ...]  # with `{subject}`, or without
    subjects: Sequence[str]


GERMAN = Language(
    forms=(
        "Erkläre einem Kind das Thema {subject}",
        "Schreibe einen kurzen Text zum Thema {subject}",
        "Nenne drei Tatsachen zum Thema {subject}",
        "Schreibe eine E-Mail an einen Freund zum Thema {subject}",
        "Ich habe eine Frage zum Thema {subject}.",
        "Kannst du mir beim Thema {subject} helfen?",
        "Schreibe eine kurze Geschichte über",
        "Was ist der Unterschied zwischen",
        "Löse diese Aufgabe Schritt für Schritt:",
        "Schreibe diesen Satz in einem höflichen Ton um:",
        "Schreibe eine Python-Funktion, die",
        "Wie kann ich in Python",
    ),
    subjects=(
        "Photosynthese;Sonnensystem;gesunde Ernährung;Klimawandel;erneuerbare Energien;Jazz;"
        "Vulkane;Zeitmanagement;Datenbanken;Vorstellungsgespräch;Bienen;Primzahlen;Fahrräder;"
        "Wahrscheinlichkeit;Gartenarbeit;Römisches Reich"
    ).split(";"),
)
FRENCH = Language(
    forms=(
        "Explique à un enfant le sujet suivant : {subject}",
        "Écris un court paragraphe sur le sujet suivant : {subject}",
        "Donne-moi trois faits sur le sujet suivant : {subject}",
        "J'ai une question sur le sujet suivant : {subject}.",
        "Écris un courriel à un ami sur le sujet suivant : {subject}",
        "Écris une courte histoire sur",
        "Quelle est la différence entre",
        "Résous ce problème étape par étape :",
        "Réécris cette phrase sur un ton plus formel :",
        "Donne-moi quelques conseils pour",
        "Écris une fonction Python qui",
        "Comment puis-je, en Python,",
    ),
    subjects=(
        "la photosynthèse;le système solaire;l'alimentation saine;le changement climatique;"
        "les énergies renouvelables;le jazz;les volcans;la gestion du temps;les bases de données;"
        "l'entretien d'embauche;les abeilles;les nombres premiers;le vélo;les probabilités;"
        "le jardinage;l'Empire romain"
    ).split(";"),
)
SPANISH = Language(
    forms=(
        "Explica a un niño el siguiente tema: {subject}",
        "Escribe un párrafo corto sobre {subject}",
        "Enumera tres datos sobre {subject}",
        "Tengo una pregunta sobre {subject}.",
        "Escribe un correo a un amigo sobre {subject}",
        "Escribe un cuento corto sobre",
        "¿Cuál es la diferencia entre",
        "Resuelve este problema paso a paso:",
        "Reescribe esta frase en un tono formal:",
        "Dame algunos consejos para",
        "Escribe una función en Python que",
        "¿Cómo puedo, en Python,",
    ),
    subjects=(
        "la fotosíntesis;el sistema solar;la alimentación sana;el cambio climático;"
        "las energías renovables;el jazz;los volcanes;la gestión del tiempo;las bases de datos;"
        "las entrevistas de trabajo;las abejas;los números primos;las bicicletas;la probabilidad;"
        "la jardinería;el Imperio romano"
    ).split(";"),
)
ITALIAN = Language(
    forms=(
        "Spiega a un bambino il seguente argomento: {subject}",
        "Scrivi un breve paragrafo sul seguente argomento: {subject}",
        "Elenca tre fatti sul seguente argomento: {subject}",
        "Ho una domanda su questo argomento: {subject}.",
        "Scrivi un'e-mail a un amico sul seguente argomento: {subject}",
        "Scrivi un breve racconto su",
        "Qual è la differenza tra",
        "Risolvi questo problema passo dopo passo:",
        "Riscrivi questa frase in tono formale:",
        "Dammi qualche consiglio per",
        "Scrivi una funzione Python che",
        "Come posso, in Python,",
    ),
    subjects=(
        "la fotosintesi;il sistema solare;l'alimentazione sana;il cambiamento climatico;"
        "le energie rinnovabili;il jazz;i vulcani;la gestione del tempo;le basi di dati;"
        "il colloquio di lavoro;le api;i numeri primi;le biciclette;la probabilità;"
        "il giardinaggio;l'Impero romano"
    ).split(";"),
)
PORTUGUESE = Language(
    forms=(
        "Explique a uma criança o seguinte tema: {subject}",
        "Escreva um parágrafo curto sobre o seguinte tema: {subject}",
        "Liste três fatos sobre o seguinte tema: {subject}",
        "Tenho uma pergunta sobre este tema: {subject}.",
        "Escreva um e-mail a um amigo sobre o seguinte tema: {subject}",
        "Escreva uma história curta sobre",
        "Qual é a diferença entre",
        "Resolva este problema passo a passo:",
        "Reescreva esta frase em tom formal:",
        "Dê-me algumas dicas para",
        "Escreva uma função em Python que",
        "Como posso, em Python,",
    ),
    subjects=(
        "a fotossíntese;o sistema solar;a alimentação saudável;as mudanças climáticas;"
        "as energias renováveis;o jazz;os vulcões;a gestão do tempo;os bancos de dados;"
        "a entrevista de emprego;as abelhas;os números primos;as bicicletas;a probabilidade;"
        "a jardinagem;o Império Romano"
    ).split(";"),
)
RUSSIAN = Language(
    forms=(
        "Объясни ребёнку тему: {subject}",
        "Напиши короткий текст на тему: {subject}",
        "Назови три факта на тему: {subject}",
        "У меня есть вопрос на тему: {subject}.",
        "Напиши письмо другу на тему: {subject}",
        "Напиши короткий рассказ о",
        "В чём разница между",
        "Реши эту задачу шаг за шагом:",
        "Перепиши это предложение в официальном стиле:",
        "Дай мне несколько советов, как",
        "Напиши функцию на Python, которая",
        "Как в Python",
    ),
    subjects=(
        "фотосинтез;Солнечная система;здоровое питание;изменение климата;"
        "возобновляемая энергия;джаз;вулканы;управление временем;базы данных;"
        "собеседование;пчёлы;простые числа;велосипеды;вероятность;садоводство;Римская империя"
    ).split(";"),
)
CHINESE = Language(
    forms=(
        "请向孩子解释{subject}",
        "写一段关于{subject}的短文",
        "列出关于{subject}的三个事实",
        "我有一个关于{subject}的问题。",
        "给朋友写一封关于{subject}的邮件",
        "你能帮我了解{subject}吗？",
        "写一个短篇故事，关于",
        "请一步一步地解决这道数学题：",
        "用正式的语气改写这句话：",
        "给我一些建议，如何",
        "写一个Python函数，",
        "在Python中怎样",
    ),
    subjects=(
        "光合作用;太阳系;健康饮食;气候变化;可再生能源;爵士乐;火山;时间管理;数据库;"
        "求职面试;蜜蜂;质数;自行车;概率;园艺;罗马帝国"
    ).split(";"),
)
JAPANESE = Language(
    forms=(
        "{subject}について子どもに説明してください",
        "{subject}について短い文章を書いてください",
        "{subject}についての事実を三つ挙げてください",
        "{subject}について質問があります。",
        "{subject}について友人へのメールを書いてください",
        "{subject}はなぜ大切なのですか",
        "{subject}についてのヒントを教えてください",
        "次の問題を順を追って解いてください：",
        "次の文を丁寧な言い方に書き直してください：",
        "短い物語を書いてください。テーマは",
        "次の処理を行うPythonの関数を書いてください：",
        "Pythonで次のことをする方法を教えてください：",
    ),
    subjects=(
        "光合成;太陽系;健康的な食事;気候変動;再生可能エネルギー;ジャズ;火山;時間管理;"
        "データベース;就職の面接;ミツバチ;素数;自転車;確率;園芸;ローマ帝国"
    ).split(";"),
)

LANGUAGES = {
    "de": GERMAN,
    "fr": FRENCH,
    "es": SPANISH,
    "it": ITALIAN,
    "pt": PORTUGUESE,
    "ru": RUSSIAN,
    "zh": CHINESE,
    "ja": JAPANESE,
}
"""By their codes in ISO 639-1."""
