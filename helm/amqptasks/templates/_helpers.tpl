{{- define "amqptasks.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "amqptasks.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "amqptasks.labels" -}}
{{ include "amqptasks.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The Secret that holds the broker's URL, and its key. */}}
{{- define "amqptasks.brokerSecret" -}}
{{- if and .Values.broker.url .Values.broker.existingSecret -}}
{{- fail "set either broker.url or broker.existingSecret, not both" -}}
{{- end -}}
{{- if .Values.broker.url -}}
{{ include "amqptasks.fullname" . }}-broker
{{- else -}}
{{ required "set broker.existingSecret to the name of a Secret that holds the AMQP URL, or broker.url" .Values.broker.existingSecret }}
{{- end -}}
{{- end -}}

{{- define "amqptasks.brokerSecretKey" -}}
{{- ternary "url" .Values.broker.existingSecretKey (not (empty .Values.broker.url)) -}}
{{- end -}}

{{/* The Deployments by name, as YAML: the workers, and the beat. */}}
{{- define "amqptasks.deployments" -}}
{{- $all := deepCopy .Values.workers -}}
{{- if .Values.beat.enabled -}}
{{- if hasKey $all "beat" -}}
{{- fail "workers.beat: this is the name of the scheduler's Deployment; rename the worker, or set beat.enabled: false" -}}
{{- end -}}
{{- $_ := set $all "beat" (merge (dict "isBeat" true) .Values.beat) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Seconds of a duration as the settings take it: 30, 30s, 1h30m. */}}
{{- define "amqptasks.seconds" -}}
{{- $units := dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0 "w" 604800.0 -}}
{{- $total := 0.0 -}}
{{- range regexFindAll "[0-9.]+ *(ms|s|m|h|d|w)?" (lower (toString .)) -1 -}}
{{- $number := regexFind "[0-9.]+" . | float64 -}}
{{- $unit := regexFind "[a-z]+" . | default "s" -}}
{{- $total = addf $total (mulf $number (get $units $unit)) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{/* The kubelet's patience with one worker: longer than the worker's own. Takes (dict "root" $ "name" … "worker" …). */}}
{{- define "amqptasks.terminationGracePeriodSeconds" -}}
{{- $seconds := .worker.terminationGracePeriodSeconds | default .root.Values.terminationGracePeriodSeconds | int -}}
{{- $settings := .root.Values.config.worker | default dict -}}
{{- $grace := 30 -}}
{{- if hasKey $settings "grace_period" -}}
{{- $grace = $settings.grace_period -}}
{{- end -}}
{{- $needed := addf (include "amqptasks.seconds" $grace | float64) 5.0 -}}
{{- if le (float64 $seconds) $needed -}}
{{- fail (printf "workers.%s: terminationGracePeriodSeconds (%d) must be above config.worker.grace_period (%v) and 5 s: tasks would be killed" .name $seconds $grace) -}}
{{- end -}}
{{- $seconds -}}
{{- end -}}

{{/* Refuses a queue that the settings do not declare: the worker would refuse it at each start. */}}
{{- define "amqptasks.queues" -}}
{{- $topology := .root.Values.config.topology | default dict -}}
{{- $declared := append (keys (.root.Values.config.queues | default dict)) ($topology.default_queue | default "default") | uniq -}}
{{- $name := .name -}}
{{- range .worker.queues -}}
{{- if not (has . $declared) -}}
{{- fail (printf "workers.%s: queue %q is not in config.queues: %s" $name . (sortAlpha $declared | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- join "," .worker.queues -}}
{{- end -}}
