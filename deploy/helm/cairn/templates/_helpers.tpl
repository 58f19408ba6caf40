{{- define "cairn.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "cairn.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: proxy
{{- end -}}

{{- define "cairn.valkeySelector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: valkey
{{- end -}}

{{- define "cairn.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "cairn.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The file that Cairn reads: the values' `config` with what the chart decides. */}}
{{- define "cairn.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $set := dict
      "server" (dict "host" "0.0.0.0" "port" 8080)
      "admin" (dict "host" "0.0.0.0" "port" 8090 "token_file" "/run/secrets/cairn/admin-token") -}}
{{- if .Values.valkey.enabled -}}
{{- if .Values.config.redis -}}
{{- if or .Values.config.redis.url .Values.config.redis.url_file .Values.config.redis.url_env -}}
{{- fail "config.redis names a Redis of your own: set valkey.enabled to false" -}}
{{- end -}}
{{- end -}}
{{- $_ := set $set "redis" (dict "url" (printf "redis://%s-valkey:6379/0" (include "cairn.fullname" .))) -}}
{{- else if and (not .Values.config.redis) (gt (int .Values.replicaCount) 1) -}}
{{- fail "more than one proxy needs a shared Redis: set valkey.enabled, or config.redis.url" -}}
{{- end -}}
{{- range .Values.config.pools -}}
{{- range .replicas -}}
{{- if and (hasPrefix "kubernetes+http://" .url) (not $.Values.discovery.enabled) -}}
{{- fail (printf "%s is found through the Kubernetes API: set discovery.enabled" .url) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $config $set) -}}
{{- end -}}

{{/* Seconds that a pod may take to stop: both parts of the drain, and five for the processes to end. */}}
{{- define "cairn.gracePeriod" -}}
{{- $server := default dict .Values.config.server -}}
{{- $accept := 2 -}}
{{- if hasKey $server "drain_accept_seconds" -}}{{- $accept = $server.drain_accept_seconds -}}{{- end -}}
{{- $drain := 30 -}}
{{- if hasKey $server "drain_seconds" -}}{{- $drain = $server.drain_seconds -}}{{- end -}}
{{- add (ceil $accept) (ceil $drain) 5 -}}
{{- end -}}
